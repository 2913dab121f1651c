-- Months that leave the database, and personal values that are erased. For the owner alone: none of
-- these functions runs with rights that its caller does not have, and the service may call none.

ALTER TABLE credentials
    -- The newest use that is in an archive; a newer one is in audit_records.
    ADD COLUMN archived_use_at timestamptz;

-- Drop a month that is in an archive: all its records, at least seven days after its end, each of
-- them in the log. What they are is not read again: the caller has verified the file. False if the
-- month is not, or not any more, what was archived.
CREATE FUNCTION archive_month_1(month_start timestamptz, archived_records bigint, record jsonb,
                                clock_skew integer) RETURNS boolean
LANGUAGE plpgsql VOLATILE SET search_path = public, pg_temp SET timezone = 'UTC' AS $$
DECLARE
    suffix   text := to_char(month_start, '_YYYY_MM');
    records  bigint;
    placed   bigint;
    last_use jsonb;
BEGIN
    PERFORM require_durable_commit_1();
    IF month_start IS DISTINCT FROM date_trunc('month', month_start)
       OR month_start + interval '1 month 7 days' > clock_timestamp() THEN
        RETURN false;
    END IF;
    -- All that takes long comes before the fence: a month that has ended gets no more records.
    EXECUTE format('SELECT count(*) FROM %I', 'audit_records' || suffix) INTO records;
    SELECT count(*) INTO placed FROM audit_leaves l
     WHERE l.id >= uuidv7_floor_1(month_start)
       AND l.id < uuidv7_floor_1(month_start + interval '1 month');
    IF records <> archived_records OR placed <> archived_records THEN
        RETURN false;
    END IF;
    EXECUTE format(
        'SELECT jsonb_object_agg(credential_id, used_at) FROM ('
        ' SELECT credential_id, max(recorded_at) AS used_at FROM %I'
        '  WHERE action = ''token.issue'' AND outcome = ''success'' AND credential_id IS NOT NULL'
        '  GROUP BY credential_id) AS uses', 'audit_records' || suffix) INTO last_use;
    IF NOT begin_act_1(record, clock_skew) THEN RETURN false; END IF;
    UPDATE credentials c
       SET archived_use_at = greatest(c.archived_use_at, use.value::timestamptz)
      FROM jsonb_each_text(last_use) AS use
     WHERE c.id = use.key;
    EXECUTE format('ALTER TABLE audit_records DETACH PARTITION %I', 'audit_records' || suffix);
    EXECUTE format('ALTER TABLE audit_personal DETACH PARTITION %I', 'audit_personal' || suffix);
    EXECUTE format('DROP TABLE %I, %I', 'audit_records' || suffix, 'audit_personal' || suffix);
    RETURN true;
END $$;

-- Which records have personal values that match.
CREATE FUNCTION matching_personal_1(kind text, wanted text, before timestamptz)
RETURNS SETOF uuid
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT p.id FROM audit_personal p
     WHERE kind = 'client_address' AND p.client_address = wanted
       AND (before IS NULL OR p.id < uuidv7_floor_1(before))
    UNION ALL
    SELECT p.id FROM audit_personal p
     WHERE kind = 'user_agent' AND p.user_agent = wanted
       AND (before IS NULL OR p.id < uuidv7_floor_1(before))
    UNION ALL
    SELECT p.id FROM audit_records r JOIN audit_personal p ON p.id = r.id
     WHERE kind = 'service_user'
       AND r.service_user_id =
           coalesce((SELECT su.id FROM service_users su WHERE su.name = wanted), wanted)
       AND (before IS NULL OR r.id < uuidv7_floor_1(before))
$$;

-- Erase them with their salts, and say on record how many; the digest in each record stays.
CREATE FUNCTION erase_personal_1(kind text, wanted text, before timestamptz, record jsonb,
                                 clock_skew integer) RETURNS bigint
LANGUAGE plpgsql VOLATILE SET search_path = public, pg_temp AS $$
DECLARE
    erased bigint;
BEGIN
    DELETE FROM audit_personal p USING matching_personal_1(kind, wanted, before) AS matching (id)
     WHERE p.id = matching.id;
    GET DIAGNOSTICS erased = ROW_COUNT;
    -- The fence comes last: a long search holds nobody up.
    IF erased > 0 AND NOT begin_act_1(
        jsonb_set(record, '{details,erased}', to_jsonb(erased)), clock_skew) THEN
        RAISE EXCEPTION 'the erasure could not be put on record' USING ERRCODE = 'PV500';
    END IF;
    RETURN erased;
END $$;

REVOKE EXECUTE ON FUNCTION archive_month_1, matching_personal_1, erase_personal_1 FROM PUBLIC;
