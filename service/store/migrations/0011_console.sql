-- What the console needs of the database.

-- Hand-over: a credential that nobody can use until whoever has its code opens it. Until then its
-- secret is one that was thrown away as it was made, so that it is like any other to all that reads.

ALTER TABLE credentials
    ADD COLUMN code_sha256  bytea UNIQUE CHECK (octet_length(code_sha256) = 32),
    -- Until when it may be opened.
    ADD COLUMN code_ends_at timestamptz,
    ADD COLUMN opened_at    timestamptz,
    -- Which one it was made to replace, by whoever held that.
    ADD COLUMN succeeds     text REFERENCES credentials (id),
    ADD CHECK ((code_sha256 IS NULL) = (code_ends_at IS NULL)),
    ADD CHECK (opened_at IS NULL OR code_sha256 IS NOT NULL);

CREATE INDEX credentials_successors ON credentials (succeeds) WHERE succeeds IS NOT NULL;

-- Shown to operators for days, of all and of one service user; there should be none.
CREATE INDEX audit_records_openings_refused ON audit_records (recorded_at)
    WHERE action = 'credential.open' AND outcome = 'refused' AND credential_id IS NOT NULL;
CREATE INDEX audit_records_openings_refused_of ON audit_records (service_user_id, recorded_at)
    WHERE action = 'credential.open' AND outcome = 'refused' AND credential_id IS NOT NULL;

-- Looked up at every page.
CREATE INDEX audit_records_sessions_ended ON audit_records ((details ->> 'session'))
    WHERE action = 'session.end';

-- The same contract as before, so the same name: what nobody opened yet, nobody administers with.
CREATE OR REPLACE FUNCTION operator_until_1() RETURNS timestamptz
LANGUAGE sql STABLE AS $$
    SELECT max(c.expires_at)
      FROM service_users su JOIN credentials c ON c.service_user_id = su.id
     WHERE su.status = 'active' AND 'service-users:write' = ANY (su.scopes)
       AND c.revoked_at IS NULL AND c.held_at IS NULL AND c.expires_at > clock_timestamp()
       AND (c.code_sha256 IS NULL OR c.opened_at IS NOT NULL)
$$;

CREATE FUNCTION hand_over_credential_1(credential jsonb, record jsonb, clock_skew integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    IF NOT begin_act_1(record || '{"action": "credential.hand_over"}', clock_skew) THEN
        RETURN false;
    END IF;
    INSERT INTO credentials (id, service_user_id, label, secret_sha256, created_at, expires_at,
                             code_sha256, code_ends_at)
    SELECT id, service_user_id, label, secret_sha256, created_at, expires_at, code_sha256,
           code_ends_at
      FROM jsonb_populate_record(NULL::credentials, credential);
    UPDATE service_users SET version = version + 1 WHERE id = credential ->> 'service_user_id';
    PERFORM end_act_1(credential ->> 'service_user_id', NULL);
    RETURN true;
END $$;

-- Put the new secret in, once; false if the code opens nothing now, or what was decided on changed.
-- Of two who open it together, one does.
CREATE FUNCTION open_hand_over_1(code bytea, secret bytea, record jsonb, clock_skew integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    offered credentials;
BEGIN
    PERFORM require_durable_commit_1();
    PERFORM pg_advisory_xact_lock(7709, 0);
    SELECT c.* INTO offered
      FROM credentials c JOIN service_users su ON su.id = c.service_user_id
     WHERE c.code_sha256 = code AND c.opened_at IS NULL AND c.code_ends_at > clock_timestamp()
       AND c.revoked_at IS NULL AND c.held_at IS NULL AND c.expires_at > clock_timestamp()
       AND su.status = 'active';
    -- Whoever calls, what is opened is on record as that.
    IF offered.id IS NULL OR NOT begin_act_1(
        record || jsonb_build_object('action', 'credential.open', 'credential_id', offered.id,
                                     'service_user_id', offered.service_user_id), clock_skew) THEN
        RETURN false;
    END IF;
    UPDATE credentials SET secret_sha256 = secret, opened_at = clock_timestamp()
     WHERE id = offered.id;
    UPDATE service_users SET version = version + 1 WHERE id = offered.service_user_id;
    PERFORM end_act_1(offered.service_user_id, NULL);
    RETURN true;
END $$;

-- Rotation by whoever holds a credential: one successor, and the old one ends after `overlap`, or
-- when it would have ended anyway. False if it has a successor, or what was decided on changed.
CREATE FUNCTION rotate_credential_1(old_id text, successor jsonb, overlap interval, record jsonb,
                                    clock_skew integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    operator_before timestamptz;
    holder text;
BEGIN
    PERFORM require_durable_commit_1();
    PERFORM pg_advisory_xact_lock(7709, 0);
    SELECT c.service_user_id INTO holder FROM credentials c
     WHERE c.id = old_id AND c.revoked_at IS NULL AND c.held_at IS NULL
       AND c.expires_at > clock_timestamp()
       AND NOT EXISTS (SELECT FROM credentials s
                        WHERE s.succeeds = old_id AND s.revoked_at IS NULL);
    IF holder IS NULL OR NOT begin_act_1(
        record || jsonb_build_object('action', 'credential.rotate', 'service_user_id', holder,
                                     'credential_id', successor ->> 'id',
                                     'actor_id', holder, 'actor_credential_id', old_id),
        clock_skew) THEN
        RETURN false;
    END IF;
    operator_before := operator_until_1();
    INSERT INTO credentials (id, service_user_id, label, secret_sha256, created_at, expires_at,
                             succeeds)
    SELECT id, holder, label, secret_sha256, created_at, expires_at, old_id
      FROM jsonb_populate_record(NULL::credentials, successor);
    UPDATE credentials SET expires_at = least(expires_at, clock_timestamp() + overlap)
     WHERE id = old_id;
    UPDATE service_users SET version = version + 1 WHERE id = holder;
    PERFORM end_act_1(holder, operator_before);
    RETURN true;
END $$;

REVOKE EXECUTE ON FUNCTION hand_over_credential_1, open_hand_over_1, rotate_credential_1
    FROM PUBLIC;
GRANT EXECUTE ON FUNCTION hand_over_credential_1, open_hand_over_1, rotate_credential_1
    TO privyseal_service;

-- API keys: lists by the beginning of a name, whatever the collation of the database.
CREATE INDEX service_users_by_name ON service_users (name COLLATE "C");
CREATE INDEX service_users_by_source_system_and_name
    ON service_users (source_system, name COLLATE "C");
CREATE INDEX service_users_disabled ON service_users (name COLLATE "C") WHERE status = 'disabled';
-- Credentials that end soon, the next one first.
CREATE INDEX credentials_by_end ON credentials (expires_at, id) WHERE revoked_at IS NULL;

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

-- The same contract as before, so the same name: `new_log` may say where its key is.
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
    -- The versions that were lost with the backup are not counted once more: some process may still
    -- hold what it read under one of them, and a commit would find that in force.
    UPDATE service_users
       SET version = greatest(version, (extract(epoch FROM clock_timestamp()) * 1000)::bigint) + 1;
    RETURN true;
END $$;
