package jobs

import (
	"context"
	"database/sql"

	"github.com/pgadvisory/advisory"
)

// SearchSchema is what RebuildSearch works on.
const SearchSchema = `
CREATE TABLE articles (
	id    bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	title text NOT NULL,
	body  text NOT NULL
);
CREATE TABLE article_search (
	article_id bigint PRIMARY KEY,
	document   tsvector NOT NULL
);
CREATE INDEX article_search_document ON article_search USING gin (document);
CREATE TABLE search_rebuild (last_article bigint NOT NULL, batches int NOT NULL);
INSERT INTO search_rebuild VALUES (0, 0);`

// RebuildSearch fills the search index from the articles, in batches, and ends when it
// has come to the last one. A batch and the note of how far it went are one statement: a
// successor goes on where the lost leader stopped, and indexes no article twice. Articles
// that are new meanwhile are for their writers to index.
//
// When the leader is done and steps down, the next replica leads, finds nothing left to
// do, and steps down, too. So RebuildSearch ends everywhere.
func RebuildSearch(ctx context.Context, db *sql.DB, p Params) error {
	return advisory.Lead(ctx, db, p.Key, func(ctx context.Context) error {
		return p.rounds(ctx, func() (done bool, err error) {
			var last int64
			err = db.QueryRowContext(ctx, `
				SELECT last_article, NOT EXISTS (SELECT FROM articles WHERE id > last_article) FROM search_rebuild`).Scan(&last, &done)
			if err != nil || done {
				return done, err
			}
			// If another has moved last_article on since, this does nothing.
			_, err = db.ExecContext(ctx, `
				WITH batch AS (
					SELECT id, title, body FROM articles WHERE id > $1 ORDER BY id LIMIT $2
				), progress AS (
					UPDATE search_rebuild SET last_article = (SELECT max(id) FROM batch), batches = batches + 1
					WHERE last_article = $1
					RETURNING last_article
				)
				INSERT INTO article_search (article_id, document)
				SELECT id, setweight(to_tsvector('english', title), 'A') || to_tsvector('english', body)
				FROM batch WHERE EXISTS (SELECT FROM progress)`, last, p.Batch)
			return false, err
		})
	}, p.Options...)
}
