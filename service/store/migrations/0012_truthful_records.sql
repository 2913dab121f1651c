-- What is on record is what was done, also by whoever has nothing but the service's password: no act
-- takes its action from the caller, nor whom it was done to. What could be left out of a record, like
-- the version that it was decided on, is put in.

-- What a record can say of an act: that it issued no token, for one, so that no digest of any gets on
-- record beside it.
CREATE FUNCTION told_1(record jsonb) RETURNS jsonb
LANGUAGE sql IMMUTABLE AS $$
    SELECT record - ARRAY['service_user_id', 'service_user', 'source_system', 'version',
                          'credential_id', 'kid', 'iat', 'exp', 'aud', 'scope',
                          'signing_input_sha256', 'jti', 'occurred_at']
$$;

CREATE OR REPLACE FUNCTION begin_key_act_1(action text, kid text, record jsonb, clock_skew integer)
RETURNS boolean
LANGUAGE sql VOLATILE SET search_path = public, pg_temp AS $$
    SELECT begin_act_1(told_1(record) || jsonb_build_object('action', action, 'kid', kid),
                       clock_skew)
$$;

-- The record of an act on a service user, or on a credential of it.
CREATE FUNCTION user_act_1(action text, su service_users, credential_id text, record jsonb)
RETURNS jsonb
LANGUAGE sql IMMUTABLE SET search_path = public, pg_temp AS $$
    SELECT told_1(record) || jsonb_build_object(
        'action', action, 'service_user_id', su.id, 'service_user', su.name,
        'source_system', su.source_system, 'credential_id', credential_id,
        'version', coalesce((record ->> 'version')::bigint, su.version))
$$;

-- Put such an act on record, on the service user as it stands under the fence; false if there is none,
-- or if it was decided on an old version.
CREATE FUNCTION begin_user_act_1(action text, user_id text, credential_id text, record jsonb,
                                 clock_skew integer) RETURNS boolean
LANGUAGE plpgsql VOLATILE SET search_path = public, pg_temp AS $$
DECLARE
    su service_users;
BEGIN
    PERFORM require_durable_commit_1();
    PERFORM pg_advisory_xact_lock(7709, 0);
    SELECT * INTO su FROM service_users WHERE id = user_id;
    RETURN su.id IS NOT NULL
       AND begin_act_1(user_act_1(action, su, credential_id, record), clock_skew);
END $$;

-- From here to `confirm_credentials_1`: the same contracts as before, so the same names.
CREATE OR REPLACE FUNCTION create_service_user_1(su jsonb, record jsonb, clock_skew integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    new service_users := jsonb_populate_record(NULL::service_users, su);
BEGIN
    -- Whoever is not there yet is at version 0.
    IF NOT begin_act_1(user_act_1('service_user.create', new, NULL, record || '{"version": 0}'),
                       clock_skew) THEN
        RETURN false;
    END IF;
    INSERT INTO service_users (id, name, source_system, owner, contact, description, scopes,
                               audiences, token_lifetime, status, version, created_at)
    VALUES (new.id, new.name, new.source_system, new.owner, new.contact, new.description,
            new.scopes, new.audiences, new.token_lifetime, new.status, new.version,
            new.created_at);
    PERFORM end_act_1(new.id, NULL);
    RETURN true;
END $$;

CREATE OR REPLACE FUNCTION change_service_user_1(su jsonb, record jsonb, clock_skew integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    old service_users;
    new service_users := jsonb_populate_record(NULL::service_users, su);
    is_described_anew boolean;
    operator_before timestamptz;
BEGIN
    PERFORM require_durable_commit_1();
    PERFORM pg_advisory_xact_lock(7709, 0);
    SELECT * INTO old FROM service_users WHERE id = new.id;
    is_described_anew :=
        (new.name, new.source_system, new.owner, new.contact, new.description, new.scopes,
         new.audiences, new.token_lifetime) IS DISTINCT FROM
        (old.name, old.source_system, old.owner, old.contact, old.description, old.scopes,
         old.audiences, old.token_lifetime);
    IF is_described_anew AND new.status <> old.status THEN
        RAISE EXCEPTION 'to change and to enable or disable are two acts' USING ERRCODE = 'PV403';
    END IF;
    IF old.id IS NULL OR NOT begin_act_1(user_act_1(
        CASE WHEN is_described_anew
                  OR new.status = old.status AND record ->> 'action' = 'service_user.change'
             THEN 'service_user.change'
             WHEN new.status = 'active' THEN 'service_user.enable'
             ELSE 'service_user.disable' END, old, NULL, record), clock_skew) THEN
        RETURN false;
    END IF;
    operator_before := operator_until_1();
    UPDATE service_users
       SET name = new.name, source_system = new.source_system, owner = new.owner,
           contact = new.contact, description = new.description, scopes = new.scopes,
           audiences = new.audiences, token_lifetime = new.token_lifetime, status = new.status,
           version = old.version + 1
     WHERE id = old.id;
    PERFORM end_act_1(old.id, operator_before);
    RETURN true;
END $$;

CREATE OR REPLACE FUNCTION create_credential_1(credential jsonb, record jsonb, clock_skew integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    IF NOT begin_user_act_1('credential.create', credential ->> 'service_user_id',
                            credential ->> 'id', record, clock_skew) THEN
        RETURN false;
    END IF;
    INSERT INTO credentials (id, service_user_id, label, secret_sha256, created_at, expires_at)
    SELECT id, service_user_id, label, secret_sha256, created_at, expires_at
      FROM jsonb_populate_record(NULL::credentials, credential);
    UPDATE service_users SET version = version + 1 WHERE id = credential ->> 'service_user_id';
    PERFORM end_act_1(credential ->> 'service_user_id', NULL);
    RETURN true;
END $$;

CREATE OR REPLACE FUNCTION revoke_credential_1(credential_id text, record jsonb,
                                               clock_skew integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    operator_before timestamptz;
    holder text := (SELECT c.service_user_id FROM credentials c WHERE c.id = credential_id);
BEGIN
    IF NOT begin_user_act_1('credential.revoke', holder, credential_id, record, clock_skew) THEN
        RETURN false;
    END IF;
    operator_before := operator_until_1();
    UPDATE credentials c SET revoked_at = clock_timestamp()
     WHERE c.id = credential_id AND c.revoked_at IS NULL;
    IF FOUND THEN
        UPDATE service_users SET version = version + 1 WHERE id = holder;
    END IF;
    PERFORM end_act_1(holder, operator_before);
    RETURN true;
END $$;

-- `privyseal bootstrap` runs where the server does, and so as the service.
CREATE OR REPLACE FUNCTION bootstrap_1(su jsonb, credential jsonb, record jsonb, force boolean,
                                       clock_skew integer) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    operator service_users := jsonb_populate_record(NULL::service_users, su);
BEGIN
    PERFORM require_durable_commit_1();
    PERFORM pg_advisory_xact_lock(7709, 0);
    IF operator_until_1() IS NOT NULL AND NOT force THEN RETURN false; END IF;
    IF NOT begin_act_1(user_act_1('operator.bootstrap', operator, credential ->> 'id',
                                  record || '{"version": 0}'), clock_skew) THEN
        RETURN false;
    END IF;
    INSERT INTO service_users (id, name, source_system, owner, contact, description, scopes,
                               audiences, token_lifetime, status, version, created_at)
    VALUES (operator.id, operator.name, operator.source_system, operator.owner, operator.contact,
            operator.description, operator.scopes, operator.audiences, operator.token_lifetime,
            operator.status, operator.version, operator.created_at);
    INSERT INTO credentials (id, service_user_id, label, secret_sha256, created_at, expires_at)
    SELECT id, operator.id, label, secret_sha256, created_at, expires_at
      FROM jsonb_populate_record(NULL::credentials, credential);
    PERFORM end_act_1(operator.id, NULL);
    RETURN true;
END $$;

CREATE OR REPLACE FUNCTION reseal_audit_log_1(sealed_log smallint, before bytea, after bytea,
                                              record jsonb)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    name text;
BEGIN
    PERFORM pg_advisory_xact_lock(7709, 0);
    UPDATE audit_logs SET sealed_private = after
     WHERE log = sealed_log AND sealed_private = before RETURNING origin INTO name;
    IF name IS NULL THEN RETURN false; END IF;
    -- The record tells no time that could be off.
    IF NOT begin_key_act_1('audit_log.rewrap', NULL, record || jsonb_build_object(
           'details', jsonb_build_object('origin', name)), 0) THEN
        RAISE EXCEPTION 'decided on an old version' USING ERRCODE = 'PV403';
    END IF;
    RETURN true;
END $$;

CREATE OR REPLACE FUNCTION confirm_credentials_1(records jsonb, clock_skew integer)
RETURNS boolean[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    verdict boolean[] := array_fill(false, ARRAY[jsonb_array_length(records)]);
    places bigint[];
    acts jsonb;
    recorded boolean[];
    holder text;
BEGIN
    PERFORM require_durable_commit_1();
    PERFORM pg_advisory_xact_lock(7709, 0);
    SELECT array_agg(place ORDER BY place),
           jsonb_agg(user_act_1('credential.confirm', su, c.id,
                                record || '{"outcome": "success", "repeats": 1}') ORDER BY place)
      INTO places, acts
      FROM jsonb_array_elements(records) WITH ORDINALITY AS r (record, place)
      JOIN credentials c ON c.id = record ->> 'credential_id' AND c.held_at IS NOT NULL
      JOIN service_users su ON su.id = c.service_user_id;
    IF places IS NULL THEN RETURN verdict; END IF;
    recorded := append_records_1(acts, clock_skew);
    FOR i IN 1 .. cardinality(places) LOOP
        verdict[places[i]] := recorded[i];
    END LOOP;
    FOR holder IN
        WITH confirmed AS (
            UPDATE credentials c SET held_at = NULL
              FROM jsonb_array_elements(records) WITH ORDINALITY AS r (record, place)
             WHERE verdict[place] AND c.id = record ->> 'credential_id'
            RETURNING c.service_user_id
        )
        UPDATE service_users SET version = version + 1
         WHERE id IN (SELECT service_user_id FROM confirmed) RETURNING id
    LOOP
        PERFORM end_act_1(holder, NULL);
    END LOOP;
    RETURN verdict;
END $$;

-- What comes to the log without an act: tokens that were issued, sessions that ended, what was read or
-- noticed, and refusals of all that can be asked of the service. Never what only the owner does.
CREATE FUNCTION is_no_act_1(action text, outcome text) RETURNS boolean
LANGUAGE sql IMMUTABLE AS $$
    SELECT coalesce(
        action IN ('token.issue', 'token.mint', 'token.end_session', 'audit.query', 'audit.export',
                   'token.forged', 'token.unknown', 'token.unverifiable')
        OR outcome = 'refused' AND action NOT IN (
                   'audit.archive', 'audit.erase', 'audit.restore_accepted', 'operator.bootstrap',
                   'audit_log.rewrap'), false)
$$;

CREATE OR REPLACE FUNCTION commit_records_1(records jsonb, clock_skew integer,
                                            OUT recorded boolean[], OUT at timestamptz)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM require_durable_commit_1();
    -- The state of a CHECK: one such record takes none of its batch with it.
    IF EXISTS (SELECT FROM jsonb_to_recordset(records) AS r (action text, outcome text)
                WHERE NOT is_no_act_1(action, outcome)) THEN
        RAISE EXCEPTION 'an act comes through its own function' USING ERRCODE = '23514';
    END IF;
    PERFORM pg_advisory_xact_lock_shared(7709, 0);
    recorded := append_records_1(records, clock_skew);
    at := clock_timestamp();
END $$;

-- What other services report has a name of theirs, or is one of these four.
CREATE FUNCTION is_reported_1(action text) RETURNS boolean
LANGUAGE sql IMMUTABLE AS $$
    SELECT coalesce(
        action IN ('jwks.loaded', 'token.forged', 'token.unknown', 'token.unverifiable')
        OR split_part(action, '.', 1) NOT IN ('token', 'service_user', 'credential', 'signing_key',
            'audit', 'audit_log', 'jwks', 'operator'), false)
$$;

CREATE OR REPLACE FUNCTION report_events_1(records jsonb, clock_skew integer) RETURNS text[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    new_records jsonb;
    new_places bigint[];
BEGIN
    PERFORM require_durable_commit_1();
    IF EXISTS (SELECT FROM jsonb_to_recordset(records) AS r (action text)
                WHERE NOT is_reported_1(action)) THEN
        RAISE EXCEPTION 'no other service does this' USING ERRCODE = '23514';
    END IF;
    PERFORM pg_advisory_xact_lock_shared(7709, 0);
    -- In the order of their ids, so that two reports of the same ones seldom wait in a circle.
    SELECT jsonb_agg(event ORDER BY id), array_agg(place) INTO new_records, new_places
      FROM (SELECT DISTINCT ON (id) (event ->> 'id')::uuid AS id, event, place
              FROM jsonb_array_elements(records) WITH ORDINALITY AS offered (event, place)
             ORDER BY id, place) AS first_of_its_id
     WHERE NOT EXISTS (SELECT FROM audit_records r WHERE r.id = first_of_its_id.id);
    IF new_records IS NOT NULL THEN
        PERFORM append_records_1(new_records, clock_skew);
    END IF;
    RETURN (
        SELECT array_agg(CASE WHEN r.id IS NULL THEN 'stale'
                              WHEN r.actor_id IS DISTINCT FROM event ->> 'actor_id'
                                   OR r.action <> event ->> 'action' THEN 'taken'
                              WHEN place = ANY (new_places) THEN 'recorded'
                              ELSE 'known' END ORDER BY place)
          FROM jsonb_array_elements(records) WITH ORDINALITY AS offered (event, place)
          LEFT JOIN audit_records r ON r.id = (event ->> 'id')::uuid);
END $$;

-- The same contract as before, so the same name; besides, false unless these are the next records of the
-- log, all of them up to the place that the head reaches, in the order of their commits. What is hashed
-- is not looked at: whoever signs the next head finds that.
CREATE OR REPLACE FUNCTION append_leaves_1(grown_log smallint, expected_size bigint, ids uuid[],
                                           leaf_hashes bytea[], levels smallint[],
                                           indexes bigint[], node_hashes bytea[],
                                           commit_order bigint, last_id uuid, note bytea,
                                           signed_at timestamptz)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
#variable_conflict use_column
DECLARE
    -- Behind every record of a transaction, whatever its id.
    last_of_all CONSTANT uuid := 'ffffffff-ffff-ffff-ffff-ffffffffffff';
    start record;
BEGIN
    PERFORM require_durable_commit_1();
    -- Whoever waited here sees below what was added meanwhile.
    PERFORM FROM audit_logs WHERE log = grown_log FOR UPDATE;
    SELECT coalesce(c.size, 0) AS size, coalesce(c.commit_order, l.begins_after) AS commit_order,
           coalesce(CASE WHEN c.size IS NULL THEN l.begins_after_id ELSE c.last_id END,
                    last_of_all) AS last_id
      INTO start
      FROM audit_logs l
      LEFT JOIN LATERAL (SELECT size, commit_order, last_id FROM audit_checkpoints
                          WHERE log = l.log ORDER BY size DESC LIMIT 1) AS c ON true
     WHERE l.log = grown_log;
    IF grown_log IS DISTINCT FROM (SELECT max(log) FROM audit_logs)
       OR expected_size IS DISTINCT FROM start.size
       OR cardinality(ids) = 0 OR cardinality(leaf_hashes) <> cardinality(ids)
       OR append_leaves_1.commit_order >= audit_horizon_1()
       OR ids IS DISTINCT FROM ARRAY(
          SELECT r.id FROM audit_records r
           WHERE (r.commit_order, r.id) > (start.commit_order, start.last_id)
             AND (r.commit_order, r.id)
                 <= (append_leaves_1.commit_order, append_leaves_1.last_id)
           ORDER BY r.commit_order, r.id) THEN
        RETURN false;
    END IF;
    INSERT INTO audit_leaves (log, leaf_index, id, leaf_hash)
    SELECT grown_log, expected_size + place - 1, id, leaf_hash
      FROM unnest(ids, leaf_hashes) WITH ORDINALITY AS leaves (id, leaf_hash, place);
    INSERT INTO audit_nodes (log, level, node_index, node_hash)
    SELECT grown_log, level, node_index, node_hash
      FROM unnest(levels, indexes, node_hashes) AS nodes (level, node_index, node_hash);
    INSERT INTO audit_checkpoints (log, size, commit_order, last_id, note, signed_at)
    VALUES (grown_log, expected_size + cardinality(ids), append_leaves_1.commit_order,
            append_leaves_1.last_id, append_leaves_1.note, append_leaves_1.signed_at);
    RETURN true;
END $$;

REVOKE EXECUTE ON FUNCTION told_1, user_act_1, begin_user_act_1, is_no_act_1, is_reported_1 FROM PUBLIC;
