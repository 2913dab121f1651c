-- What the log is asked by: each filter of a query has an index that gives the newest matches
-- first, so that a page costs the same whatever the size of the log.

-- By commits and no longer by ids: pages lead through the log in that order. One by one, as the
-- log is filled, the entries of each value are added at its end.
DROP INDEX audit_records_by_credential;
CREATE INDEX audit_records_by_credential ON audit_records (credential_id, commit_order, id)
    WHERE credential_id IS NOT NULL;
CREATE INDEX audit_records_by_source_system ON audit_records (source_system, commit_order, id)
    WHERE source_system IS NOT NULL;
CREATE INDEX audit_records_by_action ON audit_records (action, commit_order, id);
CREATE INDEX audit_records_by_kid ON audit_records (kid, commit_order, id) WHERE kid IS NOT NULL;

-- Few records have these: no issuance does, or no success.
CREATE INDEX audit_records_by_actor ON audit_records (coalesce(actor_id, actor), commit_order, id)
    WHERE actor IS NOT NULL;
CREATE INDEX audit_records_by_actor_credential
    ON audit_records (actor_credential_id, commit_order, id) WHERE actor_credential_id IS NOT NULL;
CREATE INDEX audit_records_by_outcome ON audit_records (outcome, commit_order, id)
    WHERE outcome <> 'success';
CREATE INDEX audit_records_by_reason ON audit_records (reason, commit_order, id)
    WHERE reason IS NOT NULL;

-- What is personal can leave, and is indexed where it stands: so that has the order of commits,
-- too. The default is that of its record, which the same transaction writes.
ALTER TABLE audit_personal ADD COLUMN commit_order bigint;
UPDATE audit_personal p SET commit_order = r.commit_order FROM audit_records r WHERE r.id = p.id;
ALTER TABLE audit_personal ALTER COLUMN commit_order SET NOT NULL, ALTER COLUMN commit_order
    SET DEFAULT audit_era_floor_1() + pg_current_xact_id()::text::bigint;

CREATE INDEX audit_personal_by_address ON audit_personal (client_address, commit_order, id)
    WHERE client_address <> '';
CREATE INDEX audit_personal_by_department ON audit_personal (department, commit_order, id)
    WHERE department <> '';
-- The collation in which a prefix is a range.
CREATE INDEX audit_personal_by_resource ON audit_personal (resource COLLATE "C", commit_order, id)
    WHERE resource <> '';
