-- The durable queue of merges. Times are milliseconds since the Unix epoch, by the database's clock.
CREATE TABLE jobs (
    id               TEXT    NOT NULL PRIMARY KEY, -- UUID v7: sorts by creation
    status           TEXT    NOT NULL CHECK (status IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')),
    -- Recipe and identity of the parents' files: equal keys are the same work.
    dedupe_key       TEXT    NOT NULL,
    -- 1 once a succeeded job's cache entry is gone: the key may be used again.
    retired          INTEGER NOT NULL DEFAULT 0,
    recipe           TEXT    NOT NULL,
    lambda           REAL,
    digest           TEXT,
    bytes_done       INTEGER NOT NULL DEFAULT 0,
    bytes_total      INTEGER NOT NULL DEFAULT 0,
    error_type       TEXT,
    error_detail     TEXT,
    cancel_requested INTEGER NOT NULL DEFAULT 0,
    -- Claims so far, counted when a worker takes the job.
    attempt          INTEGER NOT NULL DEFAULT 0,
    -- Fencing: grows with each claim; every write of a worker names the owner and epoch it holds.
    epoch            INTEGER NOT NULL DEFAULT 0,
    owner            TEXT,
    lease_expires_at INTEGER,
    created_at       INTEGER NOT NULL,
    started_at       INTEGER,
    finished_at      INTEGER
) STRICT;

CREATE UNIQUE INDEX jobs_one_per_key ON jobs (dedupe_key)
    WHERE status IN ('queued', 'running', 'succeeded') AND retired = 0;
CREATE INDEX jobs_by_status ON jobs (status, id);

-- Names to load a job's result under. Several requests for the same merge may each bring one.
CREATE TABLE job_names (
    job_id TEXT NOT NULL REFERENCES jobs (id),
    name   TEXT NOT NULL,
    PRIMARY KEY (job_id, name)
) STRICT;

CREATE TABLE idempotency_keys (
    key         TEXT    NOT NULL PRIMARY KEY,
    body_digest TEXT    NOT NULL,
    job_id      TEXT    NOT NULL REFERENCES jobs (id),
    created_at  INTEGER NOT NULL
) STRICT;
