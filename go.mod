module github.com/pgadvisory/advisory

go 1.25.0

require (
	github.com/DATA-DOG/go-sqlmock v1.5.2
	github.com/google/go-cmp v0.7.0
)
