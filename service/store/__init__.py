"""The only SQL of the service: implements the Protocols of `service/authority` on Postgres.

Decides nothing and knows no HTTP.
"""
