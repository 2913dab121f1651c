-- Calls that other services report: attributed to whom the token was issued, and what becomes
-- visible when there is no such token.

-- Whether a digest is that of any token on record is asked when a signature of ours is on a token
-- that is not. Eight bytes of a SHA-256 tell tokens apart well enough to find the few to compare.
CREATE INDEX audit_records_by_digest
    ON audit_records (substring(signing_input_sha256 FROM 1 FOR 8))
    WHERE signing_input_sha256 IS NOT NULL AND jti IS NULL;

-- Asked for every few seconds while an operator works; there should be none.
CREATE INDEX audit_records_token_forged ON audit_records (recorded_at)
    WHERE action = 'token.forged';

-- Since when every record is still here: the first month after the last one that was archived.
CREATE FUNCTION audit_kept_since_1() RETURNS timestamptz
LANGUAGE sql STABLE SET search_path = public, pg_temp SET timezone = 'UTC' AS $$
    WITH kept AS (
        SELECT make_timestamptz(left(right(relname, 7), 4)::integer, right(relname, 2)::integer,
                                1, 0, 0, 0) AS month
          FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
         WHERE inhparent = 'audit_records'::regclass
    )
    SELECT max(month) FROM kept
     WHERE month <= statement_timestamp()
       AND NOT EXISTS (SELECT FROM kept AS before
                        WHERE before.month = kept.month - interval '1 month')
$$;

-- The same contract as before, so the same name: it also takes `jti` and `occurred_at`.
CREATE OR REPLACE FUNCTION append_records_1(records jsonb, clock_skew integer) RETURNS boolean[]
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
            signing_input_sha256 text, jti uuid, occurred_at timestamptz, request_id text,
            repeats integer, details jsonb,
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
            exp, aud, scope, signing_input_sha256, jti, occurred_at, request_id, repeats, details,
            personal_sha256)
        SELECT id, audit_era_floor_1() + pg_current_xact_id()::text::bigint, to_timestamp(now_s),
            action, outcome, reason, service_user_id, service_user, source_system, version,
            credential_id, actor_id, actor, actor_credential_id, kid, iat, exp, aud, scope,
            decode(signing_input_sha256, 'base64'), jti, occurred_at, request_id, repeats, details,
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

REVOKE EXECUTE ON FUNCTION audit_kept_since_1 FROM PUBLIC;
GRANT EXECUTE ON FUNCTION audit_kept_since_1 TO privyseal_service;
