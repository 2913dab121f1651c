-- Service users with their credentials, signing keys, and the audit log: all that there is.
--
-- Three rules hold everywhere below.
--   1. The fence. Whoever commits audit records holds it shared, whoever changes a service user,
--      a credential or the state of a key holds it exclusively, each until its COMMIT.
--   2. A record says on which version of a service user it was decided. It is kept only while
--      that is still the version, under the fence. So a change that has returned is final.
--   3. The service only reads the tables. All that it writes goes through functions that run with
--      the owner's rights and put it on record: its password alone changes nothing unseen.
-- Functions carry a version in their name: a release that needs another one adds it, so that the
-- code before and after a migration runs side by side.

CREATE TABLE service_users (
    id             text        PRIMARY KEY CHECK (id ~ '^su_[a-z2-7]{24}$'),
    name           text        NOT NULL UNIQUE CHECK (name ~ '^[a-z0-9][a-z0-9.-]{0,62}$'),
    source_system  text        NOT NULL CHECK (source_system ~ '^[a-z][a-z0-9_]{0,62}$'),
    owner          text        NOT NULL CHECK (length(owner) <= 200),
    contact        text        NOT NULL CHECK (length(contact) <= 200),
    description    text        NOT NULL CHECK (length(description) <= 1000),
    scopes         text[]      NOT NULL CHECK (cardinality(scopes) <= 32
                                AND array_to_string(scopes, E'\n', '?') ~ '^([a-z][a-z0-9:._-]{0,63}(\n|$))*$'),
    audiences      text[]      NOT NULL CHECK (cardinality(audiences) BETWEEN 1 AND 8
                                AND array_to_string(audiences, E'\n', '?') ~ '^[!-~]+(\n[!-~]+)*$'),
    token_lifetime integer     NOT NULL CHECK (token_lifetime BETWEEN 60 AND 3600),
    status         text        NOT NULL CHECK (status IN ('active', 'disabled')),
    version        bigint      NOT NULL CHECK (version >= 1),
    created_at     timestamptz NOT NULL
);

CREATE INDEX service_users_by_source_system ON service_users (source_system, name);

CREATE TABLE credentials (
    id              text        PRIMARY KEY CHECK (id ~ '^cr_[a-z2-7]{24}$'),
    service_user_id text        NOT NULL REFERENCES service_users (id),
    label           text        NOT NULL CHECK (length(label) BETWEEN 1 AND 100),
    secret_sha256   bytea       NOT NULL UNIQUE CHECK (octet_length(secret_sha256) = 32),
    created_at      timestamptz NOT NULL,
    expires_at      timestamptz NOT NULL,
    revoked_at      timestamptz
);

CREATE INDEX credentials_by_service_user ON credentials (service_user_id);

CREATE TABLE signing_keys (
    kid             text        PRIMARY KEY CHECK (kid ~ '^[A-Za-z0-9_-]{43}$'),
    state           text        NOT NULL
                    CHECK (state IN ('pending', 'active', 'retiring', 'retired', 'revoked')),
    signer          text        NOT NULL CHECK (signer ~ '^[a-z0-9]+:'),
    public_der      bytea       NOT NULL,
    -- AES-256-GCM under the key-encryption key; gone once the key may no longer sign.
    sealed_private  bytea,
    published_at    timestamptz NOT NULL,
    activated_at    timestamptz,
    rotate_at       timestamptz,
    lifetime_cap    integer     CHECK (lifetime_cap BETWEEN 60 AND 3600),
    publish_until   timestamptz,
    ended_at        timestamptz,
    CHECK (state IN ('pending', 'revoked') OR (activated_at IS NOT NULL AND lifetime_cap IS NOT NULL)),
    CHECK (state <> 'retiring' OR publish_until IS NOT NULL),
    CHECK (state IN ('pending', 'active') OR sealed_private IS NULL)
);

CREATE UNIQUE INDEX signing_keys_one_pending ON signing_keys (state) WHERE state = 'pending';
CREATE UNIQUE INDEX signing_keys_one_active ON signing_keys (state) WHERE state = 'active';

-- The order of commits. Ids are drawn before their transaction commits, so no order of ids can
-- serve a reader that must not miss anything; transaction ids can, below pg_snapshot_xmin. A
-- logical restore starts transaction ids anew, so each cluster that the log lives in is an era.
CREATE TABLE audit_eras (
    era               smallint    PRIMARY KEY CHECK (era >= 1),
    system_identifier bigint      NOT NULL,
    opened_at         timestamptz NOT NULL
);

CREATE TABLE audit_records (
    id                   uuid        NOT NULL,
    commit_order         bigint      NOT NULL,  -- era * 2^48 + transaction id
    recorded_at          timestamptz NOT NULL,
    action               text        NOT NULL CHECK (action ~ '^[a-z_]+\.[a-z_]+$'),
    outcome              text        NOT NULL CHECK (outcome IN ('success', 'refused')),
    reason               text,
    service_user_id      text,
    service_user         text,
    source_system        text,
    version              bigint,
    credential_id        text,
    actor_id             text,
    actor                text,
    actor_credential_id  text,
    kid                  text,
    iat                  bigint,
    exp                  bigint,
    aud                  text,
    scope                text,
    signing_input_sha256 bytea       CHECK (octet_length(signing_input_sha256) = 32),
    request_id           text        NOT NULL,
    repeats              integer     NOT NULL CHECK (repeats >= 1),
    details              jsonb       NOT NULL,
    personal_sha256      bytea       CHECK (octet_length(personal_sha256) = 32),
    PRIMARY KEY (id)
) PARTITION BY RANGE (id);

CREATE INDEX audit_records_by_order ON audit_records (commit_order, id);
CREATE INDEX audit_records_by_service_user ON audit_records (service_user_id, commit_order, id);
CREATE INDEX audit_records_by_credential ON audit_records (credential_id, id)
    WHERE credential_id IS NOT NULL;
CREATE INDEX audit_records_live ON audit_records (service_user_id, exp) WHERE exp IS NOT NULL;
CREATE INDEX audit_records_by_request ON audit_records (request_id);

-- What is personal stands beside its record, which holds only
-- SHA-256(salt || canonical JSON array of the four), and can be erased without breaking a proof.
CREATE TABLE audit_personal (
    id             uuid  NOT NULL,
    salt           bytea NOT NULL CHECK (octet_length(salt) = 16),
    client_address text  NOT NULL,
    user_agent     text  NOT NULL,
    resource       text  NOT NULL,
    department     text  NOT NULL,
    PRIMARY KEY (id)
) PARTITION BY RANGE (id);

-- RFC 9562 §5.7: a UUIDv7 starts with 48 bits of milliseconds since the epoch.
CREATE FUNCTION uuidv7_floor_1(at timestamptz) RETURNS uuid
LANGUAGE sql IMMUTABLE STRICT AS $$
    SELECT (lpad(to_hex(floor(extract(epoch FROM at) * 1000)::bigint), 12, '0')
            || repeat('0', 20))::uuid
$$;

-- Make the monthly partitions from last month to `months` ahead. Owner's rights: the service may
-- add records but owns no audit table.
CREATE FUNCTION extend_audit_partitions_1(months integer) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp SET timezone = 'UTC' AS $$
DECLARE
    month timestamptz;
    parent text;
    child text;
BEGIN
    -- One at a time: two processes that start together must not both create.
    PERFORM pg_advisory_xact_lock(7709, 2);
    FOR month IN
        SELECT generate_series(date_trunc('month', clock_timestamp(), 'UTC') - interval '1 month',
                               date_trunc('month', clock_timestamp(), 'UTC')
                                   + make_interval(months => least(months, 24)), '1 month')
    LOOP
        FOREACH parent IN ARRAY ARRAY['audit_records', 'audit_personal'] LOOP
            child := parent || to_char(month AT TIME ZONE 'UTC', '_YYYY_MM');
            IF to_regclass(child) IS NULL THEN
                -- Not PARTITION OF: that would lock the parent against every reader and writer.
                EXECUTE format('CREATE TABLE %I (LIKE %I INCLUDING ALL)', child, parent);
                EXECUTE format('ALTER TABLE %I ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
                    parent, child, uuidv7_floor_1(month),
                    uuidv7_floor_1(month + interval '1 month'));
            END IF;
        END LOOP;
    END LOOP;
END $$;

-- Open a new era when the log finds itself in a cluster that it does not know.
CREATE FUNCTION open_audit_era_1() RETURNS smallint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    here bigint := (SELECT system_identifier FROM pg_control_system());
    latest audit_eras;
BEGIN
    PERFORM pg_advisory_xact_lock(7709, 1);
    SELECT * INTO latest FROM audit_eras ORDER BY era DESC LIMIT 1;
    IF latest.system_identifier IS DISTINCT FROM here THEN
        INSERT INTO audit_eras VALUES (coalesce(latest.era, 0) + 1, here, clock_timestamp())
        RETURNING * INTO latest;
    END IF;
    RETURN latest.era;
END $$;

CREATE FUNCTION audit_era_floor_1() RETURNS bigint
LANGUAGE sql STABLE AS $$ SELECT max(era)::bigint << 48 FROM audit_eras $$;

-- Readers take only records below this: whatever is committed later stands above it.
CREATE FUNCTION audit_horizon_1() RETURNS bigint
LANGUAGE sql STABLE AS $$
    SELECT audit_era_floor_1() + pg_snapshot_xmin(pg_current_snapshot())::text::bigint
$$;

-- Compare each record with what is in force, write those that hold, and say which did, in order.
-- The caller holds the fence, taken in an earlier statement, so that this one sees every commit
-- that went before. `repeats` 0 means: compare, but do not write (an equal record counts it).
CREATE FUNCTION append_records_1(records jsonb, clock_skew integer) RETURNS boolean[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    verdict boolean[];
    now_s   double precision := extract(epoch FROM clock_timestamp());
BEGIN
    -- A log that was restored must not go on in the era of the cluster that it came from.
    IF (SELECT system_identifier FROM audit_eras ORDER BY era DESC LIMIT 1)
       IS DISTINCT FROM (SELECT system_identifier FROM pg_control_system()) THEN
        PERFORM open_audit_era_1();
    END IF;
    WITH offered AS MATERIALIZED (
        SELECT * FROM ROWS FROM (jsonb_to_recordset(records) AS (
            id uuid, action text, outcome text, reason text,
            service_user_id text, service_user text, source_system text, version bigint,
            credential_id text, actor_id text, actor text, actor_version bigint,
            actor_credential_id text, kid text, iat bigint, exp bigint, aud text, scope text,
            signing_input_sha256 text, request_id text, repeats integer, details jsonb,
            personal_sha256 text, salt text, client_address text, user_agent text,
            resource text, department text)) WITH ORDINALITY
    ), judged AS MATERIALIZED (
        SELECT o.*,
               (o.version IS NULL OR o.version = coalesce(su.version, 0))
           AND (o.actor_version IS NULL OR (o.actor_version = actor.version
                AND (o.actor_credential_id IS NULL
                     OR coalesce(ac.expires_at > to_timestamp(now_s), false))))
           AND (o.iat IS NULL OR (coalesce(k.state = 'active', false)
                AND o.exp - o.iat <= k.lifetime_cap
                AND abs(o.iat - now_s) <= clock_skew
                AND (o.credential_id IS NULL
                     OR coalesce(c.expires_at > to_timestamp(now_s), false)))) AS holds
          FROM offered o
          LEFT JOIN service_users su    ON su.id = o.service_user_id
          LEFT JOIN credentials   c     ON c.id = o.credential_id
          LEFT JOIN service_users actor ON actor.id = o.actor_id
          LEFT JOIN credentials   ac    ON ac.id = o.actor_credential_id
          LEFT JOIN signing_keys  k     ON k.kid = o.kid
    ), written AS (
        INSERT INTO audit_records (
            id, commit_order, recorded_at, action, outcome, reason, service_user_id, service_user,
            source_system, version, credential_id, actor_id, actor, actor_credential_id, kid, iat,
            exp, aud, scope, signing_input_sha256, request_id, repeats, details, personal_sha256)
        SELECT id, audit_era_floor_1() + pg_current_xact_id()::text::bigint, to_timestamp(now_s),
            action, outcome, reason, service_user_id, service_user, source_system, version,
            credential_id, actor_id, actor, actor_credential_id, kid, iat, exp, aud, scope,
            decode(signing_input_sha256, 'base64'), request_id, repeats, details,
            decode(personal_sha256, 'base64')
          FROM judged WHERE coalesce(holds, false) AND repeats > 0
    ), personal AS (
        INSERT INTO audit_personal (id, salt, client_address, user_agent, resource, department)
        SELECT id, decode(salt, 'base64'), client_address, user_agent, resource, department
          FROM judged WHERE coalesce(holds, false) AND repeats > 0 AND salt IS NOT NULL
    )
    SELECT array_agg(coalesce(holds, false) ORDER BY ordinality) INTO verdict FROM judged;
    RETURN verdict;
END $$;

-- What an answer may depend on is durable when it returns, or it is not returned.
CREATE FUNCTION require_durable_commit_1() RETURNS void
LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed'
       OR current_setting('synchronous_commit') NOT IN ('on', 'remote_apply') THEN
        RAISE EXCEPTION 'audit records need read committed and synchronous_commit = on'
            USING ERRCODE = 'PV500';
    END IF;
END $$;

-- The group commit: one call, one autocommit statement, one batch.
CREATE FUNCTION commit_records_1(records jsonb, clock_skew integer,
                                 OUT recorded boolean[], OUT at timestamptz)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM require_durable_commit_1();
    PERFORM pg_advisory_xact_lock_shared(7709, 0);
    recorded := append_records_1(records, clock_skew);
    at := clock_timestamp();
END $$;

-- Take the fence and put the act on record, or say that it was decided on an old version.
CREATE FUNCTION begin_act_1(record jsonb, clock_skew integer) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    verdict boolean[];
BEGIN
    PERFORM require_durable_commit_1();
    PERFORM pg_advisory_xact_lock(7709, 0);
    verdict := append_records_1(jsonb_build_array(record), clock_skew);
    RETURN verdict[1];
END $$;

-- Until when somebody lives who can administer; null if nobody does.
CREATE FUNCTION operator_until_1() RETURNS timestamptz
LANGUAGE sql STABLE AS $$
    SELECT max(c.expires_at)
      FROM service_users su JOIN credentials c ON c.service_user_id = su.id
     WHERE su.status = 'active' AND 'service-users:write' = ANY (su.scopes)
       AND c.revoked_at IS NULL AND c.expires_at > clock_timestamp()
$$;

-- PV409 if the act leaves nobody who can administer, or soon will; tell who listens.
CREATE FUNCTION end_act_1(changed_id text, operator_before timestamptz) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    operator_now timestamptz := operator_until_1();
BEGIN
    IF coalesce(operator_now, '-infinity') < operator_before
       AND coalesce(operator_now, '-infinity') < clock_timestamp() + interval '7 days' THEN
        RAISE EXCEPTION 'the last live holder of service-users:write' USING ERRCODE = 'PV409';
    END IF;
    PERFORM pg_notify('privyseal_service_users', changed_id);
END $$;

CREATE FUNCTION create_service_user_1(su jsonb, record jsonb, clock_skew integer) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    IF NOT begin_act_1(record, clock_skew) THEN RETURN false; END IF;
    INSERT INTO service_users (id, name, source_system, owner, contact, description, scopes,
                               audiences, token_lifetime, status, version, created_at)
    SELECT id, name, source_system, owner, contact, description, scopes, audiences,
           token_lifetime, status, version, created_at
      FROM jsonb_populate_record(NULL::service_users, su);
    PERFORM end_act_1(su ->> 'id', NULL);
    RETURN true;
END $$;

-- The caller offers the service user as it shall be; the record holds the version that it was.
CREATE FUNCTION change_service_user_1(su jsonb, record jsonb, clock_skew integer) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    operator_before timestamptz;
BEGIN
    IF NOT begin_act_1(record, clock_skew) THEN RETURN false; END IF;
    operator_before := operator_until_1();
    UPDATE service_users old
       SET name = new.name, source_system = new.source_system, owner = new.owner,
           contact = new.contact, description = new.description, scopes = new.scopes,
           audiences = new.audiences, token_lifetime = new.token_lifetime, status = new.status,
           version = old.version + 1
      FROM jsonb_populate_record(NULL::service_users, su) new
     WHERE old.id = new.id;
    PERFORM end_act_1(su ->> 'id', operator_before);
    RETURN true;
END $$;

CREATE FUNCTION create_credential_1(credential jsonb, record jsonb, clock_skew integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    IF NOT begin_act_1(record, clock_skew) THEN RETURN false; END IF;
    INSERT INTO credentials (id, service_user_id, label, secret_sha256, created_at, expires_at)
    SELECT id, service_user_id, label, secret_sha256, created_at, expires_at
      FROM jsonb_populate_record(NULL::credentials, credential);
    UPDATE service_users SET version = version + 1 WHERE id = credential ->> 'service_user_id';
    PERFORM end_act_1(credential ->> 'service_user_id', NULL);
    RETURN true;
END $$;

CREATE FUNCTION revoke_credential_1(credential_id text, record jsonb, clock_skew integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    operator_before timestamptz;
    holder text;
BEGIN
    IF NOT begin_act_1(record, clock_skew) THEN RETURN false; END IF;
    operator_before := operator_until_1();
    UPDATE credentials c SET revoked_at = clock_timestamp()
     WHERE c.id = credential_id AND c.revoked_at IS NULL RETURNING c.service_user_id INTO holder;
    UPDATE service_users SET version = version + 1 WHERE id = holder;
    PERFORM end_act_1(holder, operator_before);
    RETURN true;
END $$;

-- The first operator, with a first credential, unless one lives; `force` is for a recovery.
CREATE FUNCTION bootstrap_1(su jsonb, credential jsonb, record jsonb, force boolean,
                            clock_skew integer) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(7709, 0);
    IF operator_until_1() IS NOT NULL AND NOT force THEN RETURN false; END IF;
    IF NOT create_service_user_1(su, record, clock_skew) THEN RETURN false; END IF;
    INSERT INTO credentials (id, service_user_id, label, secret_sha256, created_at, expires_at)
    SELECT id, service_user_id, label, secret_sha256, created_at, expires_at
      FROM jsonb_populate_record(NULL::credentials, credential);
    RETURN true;
END $$;

-- A step of a key's life, guarded by the state that it was decided on. Each returns whether it
-- was this call that took it: of two rotators that race, one does.
CREATE FUNCTION prepare_key_1(key jsonb, record jsonb, clock_skew integer) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM require_durable_commit_1();
    PERFORM pg_advisory_xact_lock(7709, 0);
    IF EXISTS (SELECT FROM signing_keys WHERE state = 'pending') THEN
        RETURN false;
    END IF;
    IF NOT begin_act_1(record, clock_skew) THEN RETURN false; END IF;
    INSERT INTO signing_keys (kid, state, signer, public_der, sealed_private, published_at)
    SELECT kid, 'pending', signer, public_der, sealed_private, clock_timestamp()
      FROM jsonb_populate_record(NULL::signing_keys, key);
    PERFORM pg_notify('privyseal_signing_keys', key ->> 'kid');
    RETURN true;
END $$;

-- The pending key signs from now on; the one that did is published until its last token ended.
-- This clock decides whether it was published for long enough, whatever the caller's says; only
-- where nothing signs may it be early.
CREATE FUNCTION activate_key_1(pending_kid text, active_kid text, publish_lead interval,
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
    IF NOT begin_act_1(record, clock_skew) THEN RETURN false; END IF;
    UPDATE signing_keys
       SET state = 'retiring', sealed_private = NULL,
           publish_until = clock_timestamp()
               -- A commit takes an `iat` up to the skew ahead, a verifier an `exp` up to it past.
               + make_interval(secs => signing_keys.lifetime_cap + 2 * clock_skew)
     WHERE kid = active_kid;
    UPDATE signing_keys
       SET state = 'active', activated_at = clock_timestamp(), lifetime_cap = lifetime,
           rotate_at = clock_timestamp() + rotation
     WHERE kid = pending_kid;
    PERFORM pg_notify('privyseal_signing_keys', pending_kid);
    RETURN true;
END $$;

CREATE FUNCTION retire_key_1(retiring_kid text, record jsonb, clock_skew integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM require_durable_commit_1();
    PERFORM pg_advisory_xact_lock(7709, 0);
    IF NOT EXISTS (SELECT FROM signing_keys WHERE kid = retiring_kid AND state = 'retiring'
                      AND publish_until <= clock_timestamp()) THEN
        RETURN false;
    END IF;
    IF NOT begin_act_1(record, clock_skew) THEN RETURN false; END IF;
    UPDATE signing_keys SET state = 'retired', ended_at = clock_timestamp()
     WHERE kid = retiring_kid;
    PERFORM pg_notify('privyseal_signing_keys', retiring_kid);
    RETURN true;
END $$;

SELECT extend_audit_partitions_1(3);
SELECT open_audit_era_1();

REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA public FROM PUBLIC;
GRANT EXECUTE ON FUNCTION
    extend_audit_partitions_1, open_audit_era_1, uuidv7_floor_1, audit_era_floor_1, audit_horizon_1,
    commit_records_1, create_service_user_1, change_service_user_1, create_credential_1,
    revoke_credential_1, bootstrap_1, prepare_key_1, activate_key_1, retire_key_1
    TO privyseal_service;
GRANT SELECT ON service_users, credentials, signing_keys, audit_eras, audit_records, audit_personal
    TO privyseal_service;
