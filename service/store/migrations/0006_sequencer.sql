-- Records become leaves: in the order of their commits, and together with the head that is signed.

-- Whoever adds leaves has locked their log, and 10,000 a second need not prove that it exists.
ALTER TABLE audit_leaves DROP CONSTRAINT audit_leaves_log_fkey;

-- Open the first log of this database, unless there is one. For the owner, who has the key-encryption
-- keys: a log that could be opened with less would be anybody's.
CREATE FUNCTION open_audit_log_1(origin text, public_key bytea, sealed_private bytea)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    INSERT INTO audit_logs (log, origin, public_key, sealed_private, begins_after, opened_at)
    VALUES (1, origin, public_key, sealed_private, 0, clock_timestamp())
    ON CONFLICT (log) DO NOTHING;
    RETURN FOUND;
END $$;

-- Add leaves, the complete subtrees that they fill, and the signed head over all, if the newest log
-- is `grown_log` and has `expected_size` leaves: of two sequencers that both believe to be elected,
-- one does.
CREATE FUNCTION append_leaves_1(grown_log smallint, expected_size bigint, ids uuid[],
                                leaf_hashes bytea[], levels smallint[], indexes bigint[],
                                node_hashes bytea[], commit_order bigint, last_id uuid,
                                note bytea, signed_at timestamptz)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM require_durable_commit_1();
    -- Whoever waited here sees below what was added meanwhile.
    PERFORM FROM audit_logs WHERE log = grown_log FOR UPDATE;
    IF grown_log IS DISTINCT FROM (SELECT max(log) FROM audit_logs)
       OR expected_size IS DISTINCT FROM
          (SELECT coalesce(max(size), 0) FROM audit_checkpoints WHERE log = grown_log) THEN
        RETURN false;
    END IF;
    INSERT INTO audit_leaves (log, leaf_index, id, leaf_hash)
    SELECT grown_log, expected_size + place - 1, id, leaf_hash
      FROM unnest(ids, leaf_hashes) WITH ORDINALITY AS leaves (id, leaf_hash, place);
    INSERT INTO audit_nodes (log, level, node_index, node_hash)
    SELECT grown_log, level, node_index, node_hash
      FROM unnest(levels, indexes, node_hashes) AS nodes (level, node_index, node_hash);
    INSERT INTO audit_checkpoints (log, size, commit_order, last_id, note, signed_at)
    VALUES (grown_log, expected_size + cardinality(ids), commit_order, last_id, note, signed_at);
    RETURN true;
END $$;

-- Seal a log's private half under another key-encryption key, if it still is what was read; on
-- record.
CREATE FUNCTION reseal_audit_log_1(sealed_log smallint, before bytea, after bytea, record jsonb)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(7709, 0);
    UPDATE audit_logs SET sealed_private = after
     WHERE log = sealed_log AND sealed_private = before;
    IF NOT FOUND THEN RETURN false; END IF;
    -- The record tells no time that could be off.
    RETURN begin_act_1(record, 0);
END $$;

REVOKE EXECUTE ON FUNCTION open_audit_log_1, append_leaves_1, reseal_audit_log_1 FROM PUBLIC;
GRANT EXECUTE ON FUNCTION append_leaves_1, reseal_audit_log_1 TO privyseal_service;
