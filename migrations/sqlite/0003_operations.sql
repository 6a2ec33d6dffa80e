-- Higher first among what waits.
ALTER TABLE jobs ADD COLUMN priority INTEGER NOT NULL DEFAULT 0;
-- A job whose cause of failure may pass is not claimed before this.
ALTER TABLE jobs ADD COLUMN not_before INTEGER NOT NULL DEFAULT 0;
-- Milliseconds by phase, as JSON; NULL until it succeeded.
ALTER TABLE jobs ADD COLUMN timings TEXT;
-- When the lease was last renewed: one from the future was written before the clock was put back.
ALTER TABLE jobs ADD COLUMN leased_at INTEGER;
-- The only node that may run it: its parents or its result are to lie in that node's cache.
ALTER TABLE jobs ADD COLUMN node TEXT;
CREATE INDEX idempotency_keys_by_job ON idempotency_keys (job_id);
CREATE INDEX jobs_to_claim ON jobs (priority DESC, id) WHERE status IN ('queued', 'running');
CREATE INDEX jobs_by_end ON jobs (finished_at) WHERE finished_at IS NOT NULL;
