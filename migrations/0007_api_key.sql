-- Keys that callers show. A key itself is told once, when it is made; here is its hash. Rows stay when a key is revoked, so that a
-- server that had keys once is never open to anybody.

create table api_key (
    id text not null primary key,                    -- key_…
    name text not null,                              -- what its maker calls it
    owner text not null,                             -- whose files, jobs, artifacts and models it reaches; several keys may have one
    scope text not null,                             -- read or write
    hint text not null,                              -- its last characters, to tell keys apart
    key_sha256 text not null unique,                 -- hash of the key
    created_at_ms integer not null,                  -- when it was made
    revoked_at_ms integer                            -- since when it is refused; null: it counts
) strict;
