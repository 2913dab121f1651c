-- The log as a Merkle tree (RFC 6962): which record is which leaf, and the heads that were signed.
-- All of it is only ever added to. `deploy/decisions/audit-log-encoding.md` says what is hashed.

ALTER TABLE audit_records
    -- Of a reported call: the token that it was made with, and when it happened.
    ADD COLUMN jti         uuid,
    ADD COLUMN occurred_at timestamptz,
    DROP CONSTRAINT audit_records_outcome_check,
    ADD CONSTRAINT audit_records_outcome_check CHECK (outcome IN ('success', 'refused', 'failed'));

CREATE INDEX audit_records_by_jti ON audit_records (jti) WHERE jti IS NOT NULL;

-- One log at a time; a database that was restored or cut goes on as another. `origin` is the name
-- in its checkpoints. Its Ed25519 key is sealed like a signing key, and is none.
CREATE TABLE audit_logs (
    log            smallint    PRIMARY KEY CHECK (log >= 1),
    origin         text        NOT NULL UNIQUE CHECK (origin ~ '^[!-*,-~]+$'),
    public_key     bytea       NOT NULL CHECK (octet_length(public_key) = 32),
    sealed_private bytea       NOT NULL,
    -- Records above this belong to it: era * 2^48 + transaction id.
    begins_after   bigint      NOT NULL,
    opened_at      timestamptz NOT NULL
);

-- The leaf hash stays when its record is archived, so that every proof still can be made.
CREATE TABLE audit_leaves (
    log        smallint NOT NULL REFERENCES audit_logs,
    leaf_index bigint   NOT NULL CHECK (leaf_index >= 0),
    id         uuid     NOT NULL,
    leaf_hash  bytea    NOT NULL CHECK (octet_length(leaf_hash) = 32),
    PRIMARY KEY (log, leaf_index)
);
CREATE UNIQUE INDEX audit_leaves_by_id ON audit_leaves (id);

-- Complete subtrees of 2^8, 2^16, … leaves: `service/authority/audit/merkle.py` says why these.
CREATE TABLE audit_nodes (
    log        smallint NOT NULL REFERENCES audit_logs,
    level      smallint NOT NULL CHECK (level > 0 AND level % 8 = 0),
    node_index bigint   NOT NULL CHECK (node_index >= 0),
    node_hash  bytea    NOT NULL CHECK (octet_length(node_hash) = 32),
    PRIMARY KEY (log, level, node_index)
);

-- Signed heads (C2SP tlog-checkpoint), and how far in the order of commits each of them reaches.
CREATE TABLE audit_checkpoints (
    log          smallint    NOT NULL REFERENCES audit_logs,
    size         bigint      NOT NULL CHECK (size >= 0),
    commit_order bigint      NOT NULL,
    last_id      uuid,
    note         bytea       NOT NULL,
    signed_at    timestamptz NOT NULL,
    PRIMARY KEY (log, size)
);

GRANT SELECT ON audit_logs, audit_leaves, audit_nodes, audit_checkpoints TO privyseal_service;
