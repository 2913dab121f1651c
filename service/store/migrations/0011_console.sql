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
    WHERE action = 'token.end_session';

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
    -- Whoever could use it at once would have made a credential that is on record as none.
    IF credential ->> 'code_sha256' IS NULL OR credential ->> 'code_ends_at' IS NULL THEN
        RAISE EXCEPTION 'a hand-over has a code' USING ERRCODE = 'PV403';
    END IF;
    IF NOT begin_user_act_1('credential.hand_over', credential ->> 'service_user_id',
                            credential ->> 'id', record, clock_skew) THEN
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
    IF offered.id IS NULL OR NOT begin_user_act_1(
        'credential.open', offered.service_user_id, offered.id, record, clock_skew) THEN
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
    IF holder IS NULL OR NOT begin_user_act_1(
        'credential.rotate', holder, successor ->> 'id',
        record || jsonb_build_object('actor_id', holder, 'actor_credential_id', old_id),
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

-- API keys are searched by the beginnings of words. One function splits what is there and what is
-- sought, at everything but letters and digits: no parser guesses what is a number, an address or a
-- path. In a database of the locale C only those of ASCII count as letters.
CREATE FUNCTION words_1(written text) RETURNS text[]
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT array_remove(regexp_split_to_array(lower(written), '[^[:alnum:]]+'), '')
$$;
-- That all words of `sought` begin one; null, which nothing meets, if there is no word in it.
CREATE FUNCTION words_begin_1(sought text) RETURNS tsquery
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT string_agg(quote_literal(word) || ':*', ' & ')::tsquery
      FROM unnest(words_1(sought)) AS word
$$;
-- Stored, so that a search for what many have but few together need not split each of them again.
ALTER TABLE service_users ADD COLUMN words tsvector NOT NULL
    GENERATED ALWAYS AS (array_to_tsvector(words_1(name || ' ' || owner || ' ' || contact))) STORED;
CREATE INDEX service_users_by_word ON service_users USING gin (words);

REVOKE EXECUTE ON FUNCTION words_1, words_begin_1 FROM PUBLIC;
GRANT EXECUTE ON FUNCTION words_1, words_begin_1 TO privyseal_service;

-- Lists by name, whatever the collation of the database.
CREATE INDEX service_users_by_name ON service_users (name COLLATE "C");
CREATE INDEX service_users_by_source_system_and_name
    ON service_users (source_system, name COLLATE "C");
CREATE INDEX service_users_disabled ON service_users (name COLLATE "C") WHERE status = 'disabled';
-- Credentials that end soon, the next one first.
CREATE INDEX credentials_by_end ON credentials (expires_at, id) WHERE revoked_at IS NULL;

-- Records are found by the beginning of a user agent, as by that of a resource.
CREATE INDEX audit_personal_by_user_agent
    ON audit_personal (user_agent COLLATE "C", commit_order, id) WHERE user_agent <> '';

-- The same contract as before, so the same name: all that is personal can be matched.
CREATE OR REPLACE FUNCTION matching_personal_1(kind text, wanted text, before timestamptz)
RETURNS SETOF uuid
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT p.id FROM audit_personal p
     WHERE kind = 'client_address' AND p.client_address = wanted
       AND (before IS NULL OR p.id < uuidv7_floor_1(before))
    UNION ALL
    SELECT p.id FROM audit_personal p
     WHERE kind = 'user_agent' AND p.user_agent <> '' AND p.user_agent COLLATE "C" = wanted
       AND (before IS NULL OR p.id < uuidv7_floor_1(before))
    UNION ALL
    SELECT p.id FROM audit_personal p
     WHERE kind = 'resource' AND p.resource <> '' AND p.resource COLLATE "C" = wanted
       AND (before IS NULL OR p.id < uuidv7_floor_1(before))
    UNION ALL
    SELECT p.id FROM audit_personal p
     WHERE kind = 'department' AND p.department = wanted
       AND (before IS NULL OR p.id < uuidv7_floor_1(before))
    UNION ALL
    SELECT p.id FROM audit_records r JOIN audit_personal p ON p.id = r.id
     WHERE kind = 'service_user'
       AND r.service_user_id =
           coalesce((SELECT su.id FROM service_users su WHERE su.name = wanted), wanted)
       AND (before IS NULL OR r.id < uuidv7_floor_1(before))
$$;
