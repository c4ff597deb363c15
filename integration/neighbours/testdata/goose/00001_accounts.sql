-- +goose Up
CREATE TABLE account (id bigint GENERATED ALWAYS AS IDENTITY, email text NOT NULL);
INSERT INTO account (email) SELECT 'user' || n || '@example.com' FROM generate_series(1, 1000) n;
