-- What operators do with signing keys: rotate early, revoke one, revoke all.

-- The next rotation is due now: the pending key signs as soon as it was published long enough.
CREATE FUNCTION hasten_rotation_1(active_kid text, record jsonb, clock_skew integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(7709, 0);
    IF NOT EXISTS (SELECT FROM signing_keys WHERE kid = active_kid AND state = 'active') THEN
        RETURN false;
    END IF;
    IF NOT begin_act_1(record, clock_skew) THEN RETURN false; END IF;
    UPDATE signing_keys SET rotate_at = least(rotate_at, clock_timestamp())
     WHERE kid = active_kid;
    PERFORM pg_notify('privyseal_signing_keys', active_kid);
    RETURN true;
END $$;

-- Revoke one key that was in `expected_state`. The standing next key takes the active one's
-- place in the same transaction, ripe or not: nothing is issued in between.
CREATE FUNCTION revoke_key_1(revoked_kid text, expected_state text, lifetime integer,
                             rotation interval, record jsonb, clock_skew integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(7709, 0);
    IF NOT EXISTS (SELECT FROM signing_keys WHERE kid = revoked_kid AND state = expected_state) THEN
        RETURN false;
    END IF;
    IF NOT begin_act_1(record, clock_skew) THEN RETURN false; END IF;
    UPDATE signing_keys SET state = 'revoked', sealed_private = NULL, ended_at = clock_timestamp()
     WHERE kid = revoked_kid;
    IF expected_state = 'active' THEN
        UPDATE signing_keys
           SET state = 'active', activated_at = clock_timestamp(), lifetime_cap = lifetime,
               rotate_at = clock_timestamp() + rotation
         WHERE state = 'pending';
    END IF;
    PERFORM pg_notify('privyseal_signing_keys', revoked_kid);
    RETURN true;
END $$;

-- Revoke every key that is published, if these are all, and put two new ones in: the first signs
-- at once.
CREATE FUNCTION revoke_all_keys_1(published text[], signing jsonb, next jsonb, lifetime integer,
                                  rotation interval, record jsonb, clock_skew integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(7709, 0);
    IF EXISTS (SELECT FROM signing_keys WHERE state IN ('pending', 'active', 'retiring')
                  AND kid <> ALL (published)) THEN
        RETURN false;
    END IF;
    IF NOT begin_act_1(record, clock_skew) THEN RETURN false; END IF;
    UPDATE signing_keys SET state = 'revoked', sealed_private = NULL, ended_at = clock_timestamp()
     WHERE state IN ('pending', 'active', 'retiring');
    INSERT INTO signing_keys (kid, state, signer, public_der, sealed_private, published_at,
                              activated_at, lifetime_cap, rotate_at)
    SELECT kid, 'active', signer, public_der, sealed_private, clock_timestamp(),
           clock_timestamp(), lifetime, clock_timestamp() + rotation
      FROM jsonb_populate_record(NULL::signing_keys, signing);
    INSERT INTO signing_keys (kid, state, signer, public_der, sealed_private, published_at)
    SELECT kid, 'pending', signer, public_der, sealed_private, clock_timestamp()
      FROM jsonb_populate_record(NULL::signing_keys, next);
    PERFORM pg_notify('privyseal_signing_keys', signing ->> 'kid');
    RETURN true;
END $$;

-- Seal a private half under another key-encryption key, if it still is what was read.
CREATE FUNCTION reseal_key_1(sealed_kid text, before bytea, after bytea) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    UPDATE signing_keys SET sealed_private = after
     WHERE kid = sealed_kid AND sealed_private = before;
    RETURN FOUND;
END $$;

REVOKE EXECUTE ON FUNCTION
    hasten_rotation_1, revoke_key_1, revoke_all_keys_1, reseal_key_1 FROM PUBLIC;
GRANT EXECUTE ON FUNCTION
    hasten_rotation_1, revoke_key_1, revoke_all_keys_1, reseal_key_1 TO privyseal_service;
