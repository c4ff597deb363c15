module github.com/pgadvisory/advisory/migrate

go 1.25.11

require (
	github.com/golang-migrate/migrate/v4 v4.20.1
	github.com/pgadvisory/advisory v0.1.0
)

replace github.com/pgadvisory/advisory => ../
