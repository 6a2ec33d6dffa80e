-- What a merge did, as its manifest says: statistics as JSON and warnings as a JSON list. NULL where a job ended before
-- these were kept.
ALTER TABLE jobs ADD COLUMN stats TEXT;
ALTER TABLE jobs ADD COLUMN warnings TEXT;
