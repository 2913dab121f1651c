-- What other services report to the log: events, each under an id that its reporter drew.

-- Which keys verifiers hold is asked every few seconds, and such reports are few among millions.
CREATE INDEX audit_records_jwks_loaded ON audit_records (recorded_at)
    WHERE action = 'jwks.loaded';

-- Write the records whose id is on no record yet, and say of each offered one, in order, what it
-- is now: 'recorded'; 'known' if this actor had reported it; 'taken' if the id is another
-- record's; 'stale' if it was decided on an old version. Whoever commits one of the ids at the
-- same time makes this fail with 23505, or 40P01: to be called once more, it finds them known.
CREATE FUNCTION report_events_1(records jsonb, clock_skew integer) RETURNS text[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    new_records jsonb;
    new_places bigint[];
BEGIN
    PERFORM require_durable_commit_1();
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

REVOKE EXECUTE ON FUNCTION report_events_1 FROM PUBLIC;
GRANT EXECUTE ON FUNCTION report_events_1 TO privyseal_service;
