-- +goose Up
ALTER TABLE account ADD COLUMN name text;
