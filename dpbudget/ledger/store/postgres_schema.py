"""The schema of ledgers in PostgreSQL: append-only for everybody but a superuser, whose edits verification notices.

Writers have SELECT on the tables and EXECUTE on two functions, and nothing else: ``hold`` takes the lock of a ledger,
``append`` adds records behind the last one and puts the new head in its place. Both run with the rights of the owner of
the schema (SECURITY DEFINER) and a pinned search path, so that a writer cannot slip other tables under them.
"""

from __future__ import annotations

SCHEMA_VERSION = "dpbudget ledger schema 1"
WRITER_ROLE, READER_ROLE = "dpbudget_writer", "dpbudget_reader"

#: What ``dpbudget ledger init postgresql://...`` runs where the schema is missing, in one transaction.
CREATE_SCHEMA = (
    "CREATE SCHEMA dpbudget",
    """CREATE TABLE dpbudget.ledger (
        name text PRIMARY KEY CHECK (name ~ '^[a-z0-9][a-z0-9_-]{0,62}$'),
        size bigint NOT NULL DEFAULT 0 CHECK (size >= 0))""",
    """CREATE TABLE dpbudget.record (
        ledger text NOT NULL REFERENCES dpbudget.ledger (name),
        seq bigint NOT NULL CHECK (seq >= 0),
        line bytea NOT NULL CHECK (octet_length(line) <= 4096),
        envelope bytea CHECK (octet_length(envelope) <= 2097152),
        PRIMARY KEY (ledger, seq))""",
    """CREATE TABLE dpbudget.head (
        ledger text NOT NULL REFERENCES dpbudget.ledger (name),
        size bigint NOT NULL,
        keep boolean NOT NULL,
        note bytea NOT NULL CHECK (octet_length(note) <= 1024),
        PRIMARY KEY (ledger, size))""",
    """CREATE FUNCTION dpbudget.hold(wanted text) RETURNS bigint
        LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS
        $$ SELECT size FROM dpbudget.ledger WHERE name = wanted FOR UPDATE $$""",
    """CREATE FUNCTION dpbudget.append(
            wanted text, first bigint, lines bytea[], envelopes bytea[], new_note bytea, new_keep boolean)
        RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS
        $$
        DECLARE here bigint;
        BEGIN
            SELECT size INTO here FROM dpbudget.ledger WHERE name = wanted FOR UPDATE;
            IF here IS NULL OR here <> first OR cardinality(lines) = 0 OR cardinality(lines) <> cardinality(envelopes)
            THEN RAISE EXCEPTION 'append at % to a ledger of % records', first, here;
            END IF;
            INSERT INTO dpbudget.record (ledger, seq, line, envelope)
                SELECT wanted, first + place - 1, one.line, one.envelope
                FROM unnest(lines, envelopes) WITH ORDINALITY AS one (line, envelope, place);
            here := first + cardinality(lines);
            DELETE FROM dpbudget.head WHERE ledger = wanted AND NOT keep;
            INSERT INTO dpbudget.head (ledger, size, keep, note) VALUES (wanted, here, new_keep, new_note);
            UPDATE dpbudget.ledger SET size = here WHERE name = wanted;
            RETURN here;
        END
        $$""",
    """CREATE FUNCTION dpbudget.refuse() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS
        $$ BEGIN RAISE EXCEPTION 'records of a ledger are never changed'; END $$""",
    """CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON dpbudget.record
        FOR EACH STATEMENT EXECUTE FUNCTION dpbudget.refuse()""",
    "REVOKE ALL ON SCHEMA dpbudget FROM PUBLIC",
    "REVOKE ALL ON ALL TABLES IN SCHEMA dpbudget FROM PUBLIC",
    "REVOKE ALL ON ALL FUNCTIONS IN SCHEMA dpbudget FROM PUBLIC",
    f"GRANT USAGE ON SCHEMA dpbudget TO {WRITER_ROLE}, {READER_ROLE}",
    f"GRANT SELECT ON ALL TABLES IN SCHEMA dpbudget TO {WRITER_ROLE}, {READER_ROLE}",
    f"GRANT EXECUTE ON FUNCTION dpbudget.hold(text), "
    f"dpbudget.append(text, bigint, bytea[], bytea[], bytea, boolean) TO {WRITER_ROLE}",
    f"COMMENT ON SCHEMA dpbudget IS '{SCHEMA_VERSION}'",
)
