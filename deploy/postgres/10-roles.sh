#!/bin/sh
# Run once by the postgres image, when its volume is empty.
set -eu
psql --no-psqlrc --username "$POSTGRES_USER" --dbname postgres \
  --set owner_password="$OWNER_PASSWORD" --set service_password="$SERVICE_PASSWORD" \
  --file /privyseal/roles.sql
