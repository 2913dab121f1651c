-- The service's password alone publishes no key: each says under a key-encryption key, which is in no
-- database, that it was made here. What is not attested so is not published, wherever it came from.
-- Published keys from before are attested in the transaction of this migration, by its runner.

ALTER TABLE signing_keys ADD COLUMN attestation bytea;

-- A server of the release before, which attests nothing, makes no key: the others would not publish it.
CREATE FUNCTION require_attestation_1(key jsonb) RETURNS void
LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF key ->> 'attestation' IS NULL THEN
        RAISE EXCEPTION 'a key that is published is attested' USING ERRCODE = 'PV403';
    END IF;
END $$;

-- The same contracts as before, so the same names.
CREATE OR REPLACE FUNCTION prepare_key_1(key jsonb, record jsonb, clock_skew integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM require_durable_commit_1();
    PERFORM require_attestation_1(key);
    PERFORM pg_advisory_xact_lock(7709, 0);
    IF EXISTS (SELECT FROM signing_keys WHERE state = 'pending') THEN
        RETURN false;
    END IF;
    IF NOT begin_key_act_1('signing_key.prepare', key ->> 'kid', record, clock_skew) THEN
        RETURN false;
    END IF;
    INSERT INTO signing_keys (kid, state, signer, public_der, sealed_private, attestation,
                              published_at)
    SELECT kid, 'pending', signer, public_der, sealed_private, attestation, clock_timestamp()
      FROM jsonb_populate_record(NULL::signing_keys, key);
    PERFORM pg_notify('privyseal_signing_keys', key ->> 'kid');
    RETURN true;
END $$;

CREATE OR REPLACE FUNCTION revoke_all_keys_1(published text[], signing jsonb, next jsonb,
                                             lifetime integer, rotation interval, record jsonb,
                                             clock_skew integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM require_attestation_1(signing);
    PERFORM require_attestation_1(next);
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
    INSERT INTO signing_keys (kid, state, signer, public_der, sealed_private, attestation,
                              published_at)
    SELECT kid, 'pending', signer, public_der, sealed_private, attestation, clock_timestamp()
      FROM jsonb_populate_record(NULL::signing_keys, signing);
    PERFORM promote_key_1(signing ->> 'kid', lifetime, rotation);
    INSERT INTO signing_keys (kid, state, signer, public_der, sealed_private, attestation,
                              published_at)
    SELECT kid, 'pending', signer, public_der, sealed_private, attestation, clock_timestamp()
      FROM jsonb_populate_record(NULL::signing_keys, next);
    RETURN true;
END $$;

-- Put what is sealed of a published key under another key-encryption key, if it still is what was
-- read; on record. A key that is kept elsewhere, or that signs no more, has but its attestation.
CREATE FUNCTION reseal_key_3(sealed_kid text, private_before bytea, private_after bytea,
                             attested_before bytea, attested_after bytea, record jsonb,
                             clock_skew integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(7709, 0);
    UPDATE signing_keys SET sealed_private = private_after, attestation = attested_after
     WHERE kid = sealed_kid AND state IN ('pending', 'active', 'retiring')
       AND sealed_private IS NOT DISTINCT FROM private_before
       AND attestation IS NOT DISTINCT FROM attested_before;
    IF NOT FOUND THEN RETURN false; END IF;
    IF NOT begin_key_act_1('signing_key.rewrap', sealed_kid, record, clock_skew) THEN
        RAISE EXCEPTION 'decided on an old version' USING ERRCODE = 'PV403';
    END IF;
    RETURN true;
END $$;

REVOKE EXECUTE ON FUNCTION require_attestation_1, reseal_key_3 FROM PUBLIC;
-- It would leave the attestation behind.
REVOKE EXECUTE ON FUNCTION reseal_key_2 FROM privyseal_service;
GRANT EXECUTE ON FUNCTION reseal_key_3 TO privyseal_service;
