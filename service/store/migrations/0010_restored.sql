-- A database that was restored or cut: how it goes on, and credentials that are held meanwhile.

ALTER TABLE credentials
    -- Since when it gets no token until an operator confirms it: what was revoked after the backup
    -- stands in no table any more.
    ADD COLUMN held_at timestamptz;

CREATE INDEX credentials_held ON credentials (id) WHERE held_at IS NOT NULL;

-- The same contract as before, so the same name: who is held cannot administer.
CREATE OR REPLACE FUNCTION operator_until_1() RETURNS timestamptz
LANGUAGE sql STABLE AS $$
    SELECT max(c.expires_at)
      FROM service_users su JOIN credentials c ON c.service_user_id = su.id
     WHERE su.status = 'active' AND 'service-users:write' = ANY (su.scopes)
       AND c.revoked_at IS NULL AND c.held_at IS NULL AND c.expires_at > clock_timestamp()
$$;

ALTER TABLE audit_logs
    -- Within the transaction `begins_after`: behind this record of it; null is behind all of them.
    ADD COLUMN begins_after_id uuid;

-- Go on with this database although its log does not extend what was signed: revoke every key, hold
-- every credential, and open the log `new_log`. It begins where the closed one ends: so `record`,
-- whose id comes before that of `revocation`, is the first in it, but for records that were
-- committed and had no place yet. For the owner, who has the key-encryption keys: the service may
-- not get around its own refusal.
CREATE FUNCTION accept_restored_1(new_log jsonb, closed_log smallint, published text[],
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
    INSERT INTO audit_logs (log, origin, public_key, sealed_private, begins_after, begins_after_id,
                            opened_at)
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
    SELECT new.log, new.origin, new.public_key, new.sealed_private, ends.*, clock_timestamp()
      FROM jsonb_populate_record(NULL::audit_logs, new_log) new CROSS JOIN ends
     WHERE ends.commit_order < audit_era_floor_1() + pg_current_xact_id()::text::bigint
     ORDER BY ends.commit_order DESC, ends.last_id DESC NULLS FIRST LIMIT 1;
    UPDATE credentials SET held_at = clock_timestamp()
     WHERE revoked_at IS NULL AND held_at IS NULL;
    -- The versions that were lost with the backup are not counted once more: some process may still
    -- hold what it read under one of them, and a commit would find that in force.
    UPDATE service_users
       SET version = greatest(version, (extract(epoch FROM clock_timestamp()) * 1000)::bigint) + 1;
    RETURN true;
END $$;

-- Confirm held credentials, each with its record; say of each, in order, whether its record was
-- still in force. It gets tokens then as if it had never been held.
CREATE FUNCTION confirm_credentials_1(records jsonb, clock_skew integer) RETURNS boolean[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    verdict boolean[];
    holder text;
BEGIN
    PERFORM require_durable_commit_1();
    PERFORM pg_advisory_xact_lock(7709, 0);
    -- Whoever calls, what is confirmed is on record as that.
    SELECT append_records_1(
               jsonb_agg(record || '{"action": "credential.confirm", "outcome": "success",
                                     "repeats": 1}' ORDER BY place), clock_skew)
      INTO verdict FROM jsonb_array_elements(records) WITH ORDINALITY AS r (record, place);
    FOR holder IN
        WITH confirmed AS (
            UPDATE credentials c SET held_at = NULL
              FROM jsonb_array_elements(records) WITH ORDINALITY AS r (record, place)
             WHERE verdict[place] AND c.id = record ->> 'credential_id'
               AND c.service_user_id = record ->> 'service_user_id'
            RETURNING c.service_user_id
        )
        UPDATE service_users SET version = version + 1
         WHERE id IN (SELECT service_user_id FROM confirmed) RETURNING id
    LOOP
        PERFORM end_act_1(holder, NULL);
    END LOOP;
    RETURN verdict;
END $$;

REVOKE EXECUTE ON FUNCTION accept_restored_1, confirm_credentials_1 FROM PUBLIC;
GRANT EXECUTE ON FUNCTION confirm_credentials_1 TO privyseal_service;
