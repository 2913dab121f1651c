-- Private halves that are kept elsewhere, and rotations that look at evidence.

ALTER TABLE signing_keys
    -- When a private half that this database does not hold was destroyed where it was made.
    ADD COLUMN destroyed_at timestamptz,
    -- When an operator asked for the rotation away from this key: then no verifier is waited for.
    ADD COLUMN released_at  timestamptz;

-- What names a custody is a URI of any scheme (RFC 3986 §3.1).
ALTER TABLE signing_keys
    DROP CONSTRAINT signing_keys_signer_check,
    ADD CONSTRAINT signing_keys_signer_check CHECK (signer ~ '^[a-z][a-z0-9+.-]*:');

-- Take the fence and put the act on record, or say that it was decided on an old version. An act
-- that would leave nothing on record is none: not even to whoever holds the service's password.
CREATE OR REPLACE FUNCTION begin_act_1(record jsonb, clock_skew integer) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    verdict boolean[];
BEGIN
    PERFORM require_durable_commit_1();
    PERFORM pg_advisory_xact_lock(7709, 0);
    IF coalesce((record ->> 'repeats')::integer, 0) <> 1
       OR record ->> 'outcome' IS DISTINCT FROM 'success' THEN
        RAISE EXCEPTION 'an act needs a record of it' USING ERRCODE = 'PV403';
    END IF;
    verdict := append_records_1(jsonb_build_array(record), clock_skew);
    RETURN verdict[1];
END $$;

-- The same for an act on a signing key, whose record says what was done and to which key.
CREATE FUNCTION begin_key_act_1(action text, kid text, record jsonb, clock_skew integer)
RETURNS boolean
LANGUAGE sql VOLATILE SET search_path = public, pg_temp AS $$
    SELECT begin_act_1(record || jsonb_build_object('action', action, 'kid', kid), clock_skew)
$$;

CREATE OR REPLACE FUNCTION prepare_key_1(key jsonb, record jsonb, clock_skew integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM require_durable_commit_1();
    PERFORM pg_advisory_xact_lock(7709, 0);
    IF EXISTS (SELECT FROM signing_keys WHERE state = 'pending') THEN
        RETURN false;
    END IF;
    IF NOT begin_key_act_1('signing_key.prepare', key ->> 'kid', record, clock_skew) THEN
        RETURN false;
    END IF;
    INSERT INTO signing_keys (kid, state, signer, public_der, sealed_private, published_at)
    SELECT kid, 'pending', signer, public_der, sealed_private, clock_timestamp()
      FROM jsonb_populate_record(NULL::signing_keys, key);
    PERFORM pg_notify('privyseal_signing_keys', key ->> 'kid');
    RETURN true;
END $$;

CREATE OR REPLACE FUNCTION retire_key_1(retiring_kid text, record jsonb, clock_skew integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM require_durable_commit_1();
    PERFORM pg_advisory_xact_lock(7709, 0);
    IF NOT EXISTS (SELECT FROM signing_keys WHERE kid = retiring_kid AND state = 'retiring'
                      AND publish_until <= clock_timestamp()) THEN
        RETURN false;
    END IF;
    IF NOT begin_key_act_1('signing_key.retire', retiring_kid, record, clock_skew) THEN
        RETURN false;
    END IF;
    UPDATE signing_keys SET state = 'retired', ended_at = clock_timestamp()
     WHERE kid = retiring_kid;
    PERFORM pg_notify('privyseal_signing_keys', retiring_kid);
    RETURN true;
END $$;

-- What becoming active means, however it comes about. The caller holds the fence, and has recorded
-- the act.
CREATE FUNCTION promote_key_1(promoted_kid text, lifetime integer, rotation interval)
RETURNS void
LANGUAGE sql VOLATILE SET search_path = public, pg_temp AS $$
    UPDATE signing_keys
       SET state = 'active', activated_at = clock_timestamp(), lifetime_cap = lifetime,
           rotate_at = clock_timestamp() + rotation
     WHERE kid = promoted_kid;
    SELECT pg_notify('privyseal_signing_keys', promoted_kid);
$$;

-- The same contracts as before, so the same names.
CREATE OR REPLACE FUNCTION activate_key_1(pending_kid text, active_kid text, publish_lead interval,
                                          lifetime integer, rotation interval, record jsonb,
                                          clock_skew integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM require_durable_commit_1();
    PERFORM pg_advisory_xact_lock(7709, 0);
    IF NOT EXISTS (SELECT FROM signing_keys WHERE kid = pending_kid AND state = 'pending'
                      AND (active_kid IS NULL OR published_at + publish_lead <= clock_timestamp()))
       OR (SELECT kid FROM signing_keys WHERE state = 'active') IS DISTINCT FROM active_kid THEN
        RETURN false;
    END IF;
    IF NOT begin_key_act_1('signing_key.activate', pending_kid, record, clock_skew) THEN
        RETURN false;
    END IF;
    UPDATE signing_keys
       SET state = 'retiring', sealed_private = NULL, rotate_at = clock_timestamp(),
           publish_until = clock_timestamp()
               -- A commit takes an `iat` up to the skew ahead, a verifier an `exp` up to it past.
               + make_interval(secs => signing_keys.lifetime_cap + 2 * clock_skew)
     WHERE kid = active_kid;
    PERFORM promote_key_1(pending_kid, lifetime, rotation);
    RETURN true;
END $$;

CREATE OR REPLACE FUNCTION hasten_rotation_1(active_kid text, record jsonb, clock_skew integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(7709, 0);
    IF NOT EXISTS (SELECT FROM signing_keys WHERE kid = active_kid AND state = 'active') THEN
        RETURN false;
    END IF;
    IF NOT begin_key_act_1('signing_key.rotate', active_kid, record, clock_skew) THEN
        RETURN false;
    END IF;
    UPDATE signing_keys
       SET rotate_at = least(rotate_at, clock_timestamp()),
           released_at = coalesce(released_at, clock_timestamp())
     WHERE kid = active_kid;
    PERFORM pg_notify('privyseal_signing_keys', active_kid);
    RETURN true;
END $$;

CREATE OR REPLACE FUNCTION revoke_key_1(revoked_kid text, expected_state text, lifetime integer,
                                        rotation interval, record jsonb, clock_skew integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(7709, 0);
    IF NOT EXISTS (SELECT FROM signing_keys WHERE kid = revoked_kid AND state = expected_state) THEN
        RETURN false;
    END IF;
    IF NOT begin_key_act_1('signing_key.revoke', revoked_kid, record, clock_skew) THEN
        RETURN false;
    END IF;
    UPDATE signing_keys SET state = 'revoked', sealed_private = NULL, ended_at = clock_timestamp()
     WHERE kid = revoked_kid;
    IF expected_state = 'pending' THEN
        -- Whoever was not waited for lacked that key: of the next one nobody has said anything.
        UPDATE signing_keys SET released_at = NULL WHERE state = 'active';
    ELSIF expected_state = 'active' THEN
        PERFORM promote_key_1((SELECT kid FROM signing_keys WHERE state = 'pending'),
                              lifetime, rotation);
    END IF;
    PERFORM pg_notify('privyseal_signing_keys', revoked_kid);
    RETURN true;
END $$;

CREATE OR REPLACE FUNCTION revoke_all_keys_1(published text[], signing jsonb, next jsonb,
                                             lifetime integer, rotation interval, record jsonb,
                                             clock_skew integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(7709, 0);
    IF EXISTS (SELECT FROM signing_keys WHERE state IN ('pending', 'active', 'retiring')
                  AND kid <> ALL (published)) THEN
        RETURN false;
    END IF;
    IF NOT begin_key_act_1('signing_key.revoke_all', signing ->> 'kid', record, clock_skew) THEN
        RETURN false;
    END IF;
    UPDATE signing_keys SET state = 'revoked', sealed_private = NULL, ended_at = clock_timestamp()
     WHERE state IN ('pending', 'active', 'retiring');
    INSERT INTO signing_keys (kid, state, signer, public_der, sealed_private, published_at)
    SELECT kid, 'pending', signer, public_der, sealed_private, clock_timestamp()
      FROM jsonb_populate_record(NULL::signing_keys, signing);
    PERFORM promote_key_1(signing ->> 'kid', lifetime, rotation);
    INSERT INTO signing_keys (kid, state, signer, public_der, sealed_private, published_at)
    SELECT kid, 'pending', signer, public_der, sealed_private, clock_timestamp()
      FROM jsonb_populate_record(NULL::signing_keys, next);
    RETURN true;
END $$;

-- Note that a private half is destroyed where it was made, once.
CREATE FUNCTION key_destroyed_1(destroyed_kid text, record jsonb, clock_skew integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(7709, 0);
    IF NOT EXISTS (SELECT FROM signing_keys
                    WHERE kid = destroyed_kid AND state IN ('retiring', 'retired', 'revoked')
                      AND destroyed_at IS NULL) THEN
        RETURN false;
    END IF;
    IF NOT begin_key_act_1('signing_key.destroy', destroyed_kid, record, clock_skew) THEN
        RETURN false;
    END IF;
    UPDATE signing_keys SET destroyed_at = clock_timestamp() WHERE kid = destroyed_kid;
    RETURN true;
END $$;

-- Seal a private half under another key-encryption key, if it still is what was read; on record.
CREATE FUNCTION reseal_key_2(sealed_kid text, before bytea, after bytea, record jsonb,
                             clock_skew integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(7709, 0);
    UPDATE signing_keys SET sealed_private = after
     WHERE kid = sealed_kid AND sealed_private = before;
    IF NOT FOUND THEN RETURN false; END IF;
    IF NOT begin_key_act_1('signing_key.rewrap', sealed_kid, record, clock_skew) THEN
        RAISE EXCEPTION 'decided on an old version' USING ERRCODE = 'PV403';
    END IF;
    RETURN true;
END $$;

-- It left nothing on record.
REVOKE EXECUTE ON FUNCTION reseal_key_1 FROM privyseal_service;
REVOKE EXECUTE ON FUNCTION begin_key_act_1, promote_key_1, key_destroyed_1, reseal_key_2
    FROM PUBLIC;
GRANT EXECUTE ON FUNCTION key_destroyed_1, reseal_key_2 TO privyseal_service;
