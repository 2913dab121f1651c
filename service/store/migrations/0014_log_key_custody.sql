-- The key of an audit log has the custody of signing keys: `signer` is the URI of where its private
-- half is. A log that is open already keeps the key that it has.
ALTER TABLE audit_logs
    ADD COLUMN signer text NOT NULL DEFAULT 'local:' CHECK (signer ~ '^[a-z][a-z0-9+.-]*:'),
    ALTER COLUMN sealed_private DROP NOT NULL,
    ADD CHECK ((signer = 'local:') = (sealed_private IS NOT NULL));

-- Open the first log of this database, unless there is one. For the owner, as before.
CREATE FUNCTION open_audit_log_2(origin text, public_key bytea, signer text, sealed_private bytea)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    INSERT INTO audit_logs (log, origin, public_key, signer, sealed_private, begins_after, opened_at)
    VALUES (1, origin, public_key, signer, sealed_private, 0, clock_timestamp())
    ON CONFLICT (log) DO NOTHING;
    RETURN FOUND;
END $$;

REVOKE EXECUTE ON FUNCTION open_audit_log_2 FROM PUBLIC;

-- The same contract as before, so the same name: `new_log` may say where its key is; and what was
-- decided before the backup lets nobody in, nor any person.
CREATE OR REPLACE FUNCTION accept_restored_1(new_log jsonb, closed_log smallint, published text[],
                                  signing jsonb, next jsonb, lifetime integer, rotation interval,
                                  record jsonb, revocation jsonb, clock_skew integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM require_durable_commit_1();
    PERFORM pg_advisory_xact_lock(7709, 0);
    IF closed_log IS DISTINCT FROM (SELECT max(log) FROM audit_logs)
       OR NOT revoke_all_keys_1(published, signing, next, lifetime, rotation, revocation,
                                clock_skew) THEN
        RETURN false;
    END IF;
    PERFORM begin_act_1(record || '{"action": "audit.restore_accepted"}', clock_skew);
    -- Where the closed log ends: at its head, or at a leaf that a cut left behind that.
    INSERT INTO audit_logs (log, origin, public_key, signer, sealed_private, begins_after,
                            begins_after_id, opened_at)
    WITH head AS (
        SELECT size, commit_order, last_id FROM audit_checkpoints
         WHERE log = closed_log ORDER BY size DESC LIMIT 1
    ), ends (commit_order, last_id) AS (
        SELECT begins_after, begins_after_id FROM audit_logs WHERE log = closed_log
         UNION ALL
        SELECT commit_order, last_id FROM head
         UNION ALL
        SELECT r.commit_order, r.id FROM audit_leaves l JOIN audit_records r ON r.id = l.id
         WHERE l.log = closed_log AND l.leaf_index >= coalesce((SELECT size FROM head), 0)
    )
    SELECT new.log, new.origin, new.public_key, coalesce(new.signer, 'local:'), new.sealed_private,
           ends.*, clock_timestamp()
      FROM jsonb_populate_record(NULL::audit_logs, new_log) new CROSS JOIN ends
     WHERE ends.commit_order < audit_era_floor_1() + pg_current_xact_id()::text::bigint
     ORDER BY ends.commit_order DESC, ends.last_id DESC NULLS FIRST LIMIT 1;
    UPDATE credentials SET held_at = clock_timestamp()
     WHERE revoked_at IS NULL AND held_at IS NULL;
    -- People have no credential: what is held of them is the person.
    UPDATE service_users SET status = 'disabled' WHERE source_system = 'console';
    -- The versions that were lost with the backup are not counted once more: some process may still
    -- hold what it read under one of them, and a commit would find that in force.
    UPDATE service_users
       SET version = greatest(version, (extract(epoch FROM clock_timestamp()) * 1000)::bigint) + 1;
    RETURN true;
END $$;
