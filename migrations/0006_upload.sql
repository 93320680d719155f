-- Files that come in parts: an upload collects them, and becomes a file when it is completed.

create table upload (
    id text not null primary key,                    -- upload_…
    owner text not null,                             -- whose it is
    filename text not null,                          -- the name of the file to be
    purpose text not null,                           -- OpenAI's word, fine-tune for one
    size_bytes integer not null,                     -- number of bytes that the file is to have
    status text not null,                            -- pending, completed, cancelled, expired
    file_expires_after_seconds integer,              -- how long the file is kept after it was made; null: for ever
    file_id text,                                    -- the file; null until it is completed
    created_at_ms integer not null,                  -- when it was made
    expires_at_ms integer not null                   -- until when parts are taken
) strict;

create index upload_by_status on upload (status, expires_at_ms);

create table upload_part (
    id text not null primary key,                    -- part_…
    upload_id text not null references upload (id),  -- the upload it is for
    size_bytes integer not null,                     -- number of bytes
    object_key text not null,                        -- where storage has the bytes
    created_at_ms integer not null                   -- when it was made
) strict;

create index upload_part_by_upload on upload_part (upload_id);
