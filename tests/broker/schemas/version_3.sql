-- The tables as schema version 3 made them.

CREATE TABLE apps (
    app_id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used again, so that no cache can mix two apps up
    key TEXT NOT NULL UNIQUE, name TEXT NOT NULL, master_secret TEXT NOT NULL, device_key TEXT NOT NULL,
    signing_key BLOB NOT NULL, open INTEGER NOT NULL, created_at REAL NOT NULL,
    offline_limit INTEGER NOT NULL,
    deleted INTEGER NOT NULL DEFAULT 0,
    purged_to INTEGER NOT NULL DEFAULT 0,  -- of a deleted app: its messages up to this id are gone
    access TEXT NOT NULL DEFAULT '[]',  -- access rules, as JSON
    settings TEXT NOT NULL DEFAULT '{}');  -- AppSettings, as JSON
CREATE INDEX deleted_apps ON apps (app_id) WHERE deleted;

CREATE TABLE devices (
    app INTEGER NOT NULL, devno INTEGER NOT NULL, rid TEXT NOT NULL, platform TEXT NOT NULL, alias TEXT,
    tags TEXT NOT NULL, mobile TEXT, generation INTEGER NOT NULL, created_at REAL NOT NULL,
    last_online_at REAL, attributes TEXT NOT NULL DEFAULT '{}',  -- as JSON
    PRIMARY KEY (app, devno)) WITHOUT ROWID;
CREATE UNIQUE INDEX devices_by_rid ON devices (app, rid);
CREATE INDEX revoked_devices ON devices (app, devno, generation) WHERE generation > 0;

CREATE TABLE postings (  -- chunk = devno >> 16: one changed tag rewrites at most 8 KB
    app INTEGER NOT NULL, kind TEXT NOT NULL, value TEXT NOT NULL, chunk INTEGER NOT NULL, bits BLOB NOT NULL,
    PRIMARY KEY (app, kind, value, chunk)) WITHOUT ROWID;

CREATE TABLE messages (
    msg_id INTEGER PRIMARY KEY, app INTEGER NOT NULL, broadcast INTEGER NOT NULL,
    body BLOB,  -- NULL once nobody can be owed it, and nobody is to be told that it expired
    created_at REAL NOT NULL, expires_at REAL NOT NULL, sendno TEXT NOT NULL,
    target NOT NULL,  -- a devno (INTEGER), or a bitmap (BLOB); the same for the next two
    delivered, evicted,
    recalled, sent,  -- the same; sent has those that were sent it and have not acknowledged it
    suppressed BLOB, online INTEGER NOT NULL DEFAULT 0, high INTEGER NOT NULL DEFAULT 0,
    collapse TEXT, replaces INTEGER, part_of INTEGER,
    paced INTEGER NOT NULL DEFAULT 0,  -- a whole that is delivered in parts
    callback TEXT,  -- as JSON
    withdrawn_at REAL, replaced_by INTEGER,  -- as a whole: by its publisher, by the first that overrode it
    done_at REAL, sent_at REAL, node INTEGER);  -- of a single target: when it was delivered (evicted, recalled)
CREATE INDEX messages_by_expiry ON messages (expires_at) WHERE body IS NOT NULL;
CREATE INDEX live_broadcasts ON messages (app, msg_id) WHERE broadcast AND body IS NOT NULL;

CREATE INDEX messages_with_callback ON messages (app) WHERE callback IS NOT NULL;
CREATE INDEX messages_by_part ON messages (part_of) WHERE part_of IS NOT NULL;
CREATE INDEX messages_by_collapse ON messages (app, collapse, broadcast, msg_id)
    WHERE collapse IS NOT NULL AND body IS NOT NULL;
CREATE INDEX paced_by_collapse ON messages (app, collapse, expires_at) WHERE collapse IS NOT NULL AND paced;

CREATE TABLE settled (  -- what bitmap messages got since they were folded last
    msg_id INTEGER NOT NULL, delivered BLOB, evicted BLOB, recalled BLOB, sent BLOB, at REAL NOT NULL DEFAULT 0,
    sent_at REAL NOT NULL DEFAULT 0, node INTEGER NOT NULL DEFAULT 0);
CREATE INDEX settled_by_message ON settled (msg_id);

CREATE TABLE inbox (
    app INTEGER NOT NULL, devno INTEGER NOT NULL, msg_id INTEGER NOT NULL,
    PRIMARY KEY (app, devno, msg_id)) WITHOUT ROWID;

CREATE TABLE cids (
    app INTEGER NOT NULL, cid TEXT NOT NULL, msg_id INTEGER NOT NULL, expires_at REAL NOT NULL,
    PRIMARY KEY (app, cid)) WITHOUT ROWID;
CREATE INDEX cids_by_expiry ON cids (expires_at);

CREATE TABLE events (
    id INTEGER PRIMARY KEY, app INTEGER NOT NULL, devno INTEGER NOT NULL, name TEXT NOT NULL,
    at REAL NOT NULL, payload BLOB NOT NULL);
CREATE INDEX events_by_app ON events (app);

CREATE TABLE retained (
    app INTEGER NOT NULL, topic TEXT NOT NULL, payload BLOB NOT NULL, qos INTEGER NOT NULL,
    properties BLOB NOT NULL, expires_at REAL, source TEXT NOT NULL DEFAULT '', PRIMARY KEY (app, topic));
CREATE INDEX retained_by_expiry ON retained (expires_at) WHERE expires_at IS NOT NULL;

CREATE TABLE session_items (
    app INTEGER NOT NULL, session INTEGER NOT NULL, kind TEXT NOT NULL,
    item BLOB NOT NULL,  -- of BLOB affinity: 1 and '1' stay apart
    value BLOB NOT NULL, PRIMARY KEY (app, session, kind, item)) WITHOUT ROWID;


CREATE TABLE nodes (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);  -- 0: no node

CREATE TABLE steps (  -- who did what when, in stretches of time; chunk = devno >> 16
    msg_id INTEGER NOT NULL, step TEXT NOT NULL, node INTEGER NOT NULL, start INTEGER NOT NULL,
    width INTEGER NOT NULL, chunk INTEGER NOT NULL, bits BLOB NOT NULL,
    PRIMARY KEY (msg_id, step, node, start, width, chunk)) WITHOUT ROWID;

CREATE TABLE records (
    app INTEGER NOT NULL, kind TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL, version INTEGER NOT NULL,
    due REAL, PRIMARY KEY (app, kind, key)) WITHOUT ROWID;
CREATE INDEX records_due ON records (kind, due) WHERE due IS NOT NULL;

CREATE TABLE files (
    app INTEGER NOT NULL, file TEXT NOT NULL, piece INTEGER NOT NULL, bytes BLOB NOT NULL,
    PRIMARY KEY (app, file, piece)) WITHOUT ROWID;

CREATE TABLE callback_events (
    id INTEGER PRIMARY KEY, app INTEGER NOT NULL, msg_id INTEGER NOT NULL, event TEXT NOT NULL, at REAL NOT NULL,
    bits BLOB NOT NULL, callback TEXT NOT NULL,
    due REAL,  -- NULL: parked
    attempts INTEGER NOT NULL DEFAULT 0, error TEXT NOT NULL DEFAULT '');
CREATE INDEX callback_events_due ON callback_events (due) WHERE due IS NOT NULL;
CREATE INDEX callback_events_by_app ON callback_events (app, id);
CREATE INDEX callback_events_parked ON callback_events (app, id) WHERE due IS NULL;

CREATE TABLE activity (  -- who was there in an hour or a day (width, seconds); chunk = devno >> 16
    app INTEGER NOT NULL, kind TEXT NOT NULL, width INTEGER NOT NULL, start INTEGER NOT NULL,
    chunk INTEGER NOT NULL, bits BLOB NOT NULL,
    PRIMARY KEY (app, kind, width, start, chunk)) WITHOUT ROWID;

CREATE TABLE audit (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, app INTEGER NOT NULL, actor TEXT NOT NULL,
    address TEXT NOT NULL, action TEXT NOT NULL, subject TEXT NOT NULL, outcome TEXT NOT NULL);
CREATE INDEX audit_by_app ON audit (app, id);

CREATE TABLE high_water (
    id INTEGER NOT NULL,  -- the greatest message or event id given out before the last purge
    epoch INTEGER NOT NULL);  -- the route epochs of this run are above it
INSERT INTO high_water VALUES (0, 0);
