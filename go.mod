module github.com/pgadvisory/advisory

go 1.25.0
