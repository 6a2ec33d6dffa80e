-- The durable queue of merges, as in migrations/sqlite; flags are numbers there and here. Times are milliseconds since the
-- Unix epoch, by the database's clock.
CREATE TABLE jobs (
    -- UUID v7: sorts by creation, so by bytes and not by any language
    id               TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    status           TEXT             NOT NULL CHECK (status IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')),
    -- Recipe and identity of the parents' files: equal keys are the same work.
    dedupe_key       TEXT             NOT NULL,
    -- 1 once a succeeded job's cache entry is gone: the key may be used again.
    retired          BIGINT           NOT NULL DEFAULT 0,
    recipe           TEXT             NOT NULL,
    lambda           DOUBLE PRECISION,
    digest           TEXT,
    bytes_done       BIGINT           NOT NULL DEFAULT 0,
    bytes_total      BIGINT           NOT NULL DEFAULT 0,
    error_type       TEXT,
    error_detail     TEXT,
    cancel_requested BIGINT           NOT NULL DEFAULT 0,
    -- Claims so far, counted when a worker takes the job.
    attempt          BIGINT           NOT NULL DEFAULT 0,
    -- Fencing: grows with each claim; every write of a worker names the owner and epoch it holds.
    epoch            BIGINT           NOT NULL DEFAULT 0,
    owner            TEXT,
    lease_expires_at BIGINT,
    created_at       BIGINT           NOT NULL,
    started_at       BIGINT,
    finished_at      BIGINT,
    -- What a merge did, as its manifest says: statistics as JSON and warnings as a JSON list.
    stats            TEXT,
    warnings         TEXT,
    -- Higher first among what waits.
    priority         BIGINT           NOT NULL DEFAULT 0,
    -- A job whose cause of failure may pass is not claimed before this.
    not_before       BIGINT           NOT NULL DEFAULT 0,
    -- Milliseconds by phase, as JSON; NULL until it succeeded.
    timings          TEXT,
    -- When the lease was last renewed: one from the future was written before the clock was put back.
    leased_at        BIGINT,
    -- The only node that may run it: its parents or its result are to lie in that node's cache.
    node             TEXT
);

CREATE UNIQUE INDEX jobs_one_per_key ON jobs (dedupe_key)
    WHERE status IN ('queued', 'running', 'succeeded') AND retired = 0;
CREATE INDEX jobs_by_status ON jobs (status, id);
CREATE INDEX jobs_to_claim ON jobs (priority DESC, id) WHERE status IN ('queued', 'running');
CREATE INDEX jobs_by_end ON jobs (finished_at) WHERE finished_at IS NOT NULL;

-- Names to load a job's result under. Several requests for the same merge may each bring one.
CREATE TABLE job_names (
    job_id TEXT COLLATE "C" NOT NULL REFERENCES jobs (id),
    name   TEXT             NOT NULL,
    PRIMARY KEY (job_id, name)
);

CREATE TABLE idempotency_keys (
    key         TEXT             NOT NULL PRIMARY KEY,
    body_digest TEXT             NOT NULL,
    job_id      TEXT COLLATE "C" NOT NULL REFERENCES jobs (id),
    created_at  BIGINT           NOT NULL
);
CREATE INDEX idempotency_keys_by_job ON idempotency_keys (job_id);
