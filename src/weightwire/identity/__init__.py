"""Which shards are interchangeable: identities, their keys, revisions. Pure, no torch."""
