-- The two roles and the database, made once by a superuser of the server:
--   psql -v owner_password=... -v service_password=... -f deploy/postgres/roles.sql
--
-- privyseal_owner runs `privyseal migrate` and owns every table; privyseal_service runs
-- `privyseal serve`, and can only add to the audit log. What it may do, the migrations grant.
\set ON_ERROR_STOP on

-- Statements with a password must not reach the server's log.
SET log_statement = 'none';
SET log_min_duration_statement = -1;
SET log_min_error_statement = 'panic';

CREATE ROLE privyseal_owner   LOGIN PASSWORD :'owner_password';
CREATE ROLE privyseal_service LOGIN PASSWORD :'service_password';

CREATE DATABASE privyseal OWNER privyseal_owner ENCODING 'UTF8' TEMPLATE template0;
REVOKE ALL ON DATABASE privyseal FROM PUBLIC;
GRANT CONNECT ON DATABASE privyseal TO privyseal_service;
