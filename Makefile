# The two commands of a fresh machine are "make demo" and "make test". Both find a
# PostgreSQL themselves: see integration/internal/pgtest.

GO          ?= go
STATICCHECK ?= honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOCOGNIT    ?= github.com/uudashr/gocognit/cmd/gocognit@v1.3.0
GOVULNCHECK ?= golang.org/x/vuln/cmd/govulncheck@v1.9.0
MODULES     := . otel gocron migrate cmd/advisory integration

# The race detector needs cgo, and that a C compiler.
RACE ?= $(if $(shell command -v $$($(GO) env CC) 2>/dev/null),-race)

.PHONY: demo test test-matrix bench unit stress cover lint vuln fmt tidy

demo: ## the main job, live
	@echo "Compiling the demo …"
	@cd integration && $(GO) run ./demo

test: unit ## everything
	cd integration && $(GO) test $(RACE) $(WAITING) -timeout 30m $(TESTFLAGS) ./...

# One package at a time, because they measure; three tests at a time, because most of them wait.
WAITING := -p 1 -parallel 3

test-matrix: ## the integration tests against each PostgreSQL version: VERSIONS="14 18" ARGS="-run Restart"
	cd integration && $(GO) run ./internal/matrix $(VERSIONS) -- $(GO) test $(RACE) $(WAITING) -timeout 30m -count=1 $(TESTFLAGS) $(ARGS) ./...

VERSIONS ?= 14 15 16 17 18

bench: ## what a lock costs, against others: BENCHFLAGS="-run OneKey" for less
	cd integration && $(GO) run ./bench $(BENCHFLAGS)

BENCHFLAGS ?= -out bench -docs ..

unit: ## what needs no PostgreSQL
	$(GO) test $(RACE) $(TESTFLAGS) ./...
	for m in $(filter-out . integration,$(MODULES)); do (cd $$m && $(GO) test $(RACE) $(TESTFLAGS) ./...) || exit 1; done
	cd otel && $(GO) test $(TESTFLAGS) -run Allocates ./...

stress: ## the concurrency tests, again and again
	$(GO) test -race -count=20 ./...
	cd integration && $(GO) test -race -count=20 -timeout 60m -run '$(STRESS)' .

STRESS ?= NoUpdateIsLost|LeftBehind|LockIsReleased|HandOff|HeldKeyAgain|MomentOfAHeartbeat

cover: ## how much of the root package the tests reach, and what they do not
	@GO='$(GO)' COVER_UNIT='$(COVER_UNIT)' COVER_ALL='$(COVER_ALL)' .ci/cover

# The least shares of statements, in per cent: by the unit tests alone, and by all tests.
COVER_UNIT ?= 90
COVER_ALL  ?= 95

lint: ## what the field's linters say; nothing is changed
	@unformatted=$$(gofmt -l .); test -z "$$unformatted" || { echo "not formatted:"; echo "$$unformatted"; exit 1; }
	@long=$$(find . -name '*_test.go' -exec awk 'FNR == 801 { print FILENAME " has more than 800 lines" }' {} +; \
	find . \( -path ./otel -o -path ./cmd -o -path ./integration \) -prune -o -name '*.go' ! -name '*_test.go' \
		-exec awk 'FNR == 401 { print FILENAME " has more than 400 lines" }' {} +); \
	test -z "$$long" || { echo "too long:"; echo "$$long"; exit 1; }
	@.ci/documents
	for m in $(MODULES); do (cd $$m && $(GO) vet ./... && $(GO) run $(STATICCHECK) ./...) || exit 1; done
	cd cmd/advisory && GOOS=darwin $(GO) vet . # CI builds it for FreeBSD and Windows, too
	$(GO) run $(GOCOGNIT) $(COGNITFLAGS) -over 20 .
	for m in $(filter-out .,$(MODULES)); do (cd $$m && $(GO) run $(GOCOGNIT) $(COGNITFLAGS) -over 25 .) || exit 1; done
	@outside=$$($(GO) list -deps -f '{{if not .Standard}}{{.ImportPath}}{{end}}' . | grep -Ev "^$$($(GO) list -m)(/internal/.*)?$$"); \
	test -z "$$outside" || { echo "the root package, and internal/, must import the standard library alone:"; echo "$$outside"; exit 1; }
	@$(MAKE) --no-print-directory vuln

# With types, gocognit goes by packages, and so keeps to one module.
COGNITFLAGS ?= -exact-recursion -test=false

vuln: ## known vulnerabilities in what is called; without a network, a line that says so
	@GO='$(GO)' GOVULNCHECK='$(GOVULNCHECK)' VULNFLAGS='$(VULNFLAGS)' .ci/vuln $(MODULES)

fmt:
	gofmt -w .

tidy: ## go mod tidy, which knows nothing of the command's go.work
	trap '(cd cmd/advisory && $(GO) mod edit -dropreplace github.com/pgadvisory/advisory)' EXIT; \
	(cd cmd/advisory && $(GO) mod edit -replace github.com/pgadvisory/advisory=../..) && \
	for m in $(MODULES); do (cd $$m && $(GO) mod tidy) || exit 1; done
