"""The audit log: what is on record, and how it gets there."""

from service.authority.audit.log import AuditLog, RecordsRejected, RecordWriter
from service.authority.audit.record import (
    Action,
    AuditRecord,
    Outcome,
    RecordFilter,
    RecordReader,
    StoredRecord,
    new_record_id,
    personal,
)

__all__ = [
    "Action",
    "AuditLog",
    "AuditRecord",
    "Outcome",
    "RecordFilter",
    "RecordReader",
    "RecordWriter",
    "RecordsRejected",
    "StoredRecord",
    "new_record_id",
    "personal",
]
