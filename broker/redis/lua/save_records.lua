-- Makes record changes, all or none.
-- KEYS[1]: <tag>:kinds. ARGV: tag; changes as records.lua reads them; token of the call.
-- Answer: the new versions, or a refusal of records.lua. The same token again within a minute: the same versions.
-- repeatable
-- include records
local tag, done = ARGV[1], ARGV[1] .. ':done:' .. ARGV[3]
local before = redis.call('GET', done)
if before then return cmsgpack.unpack(before) end
local changes = read_changes(ARGV[2])
local refusal = check_changes(tag, changes)
if refusal then return refusal end
local versions = make_changes(tag, changes, {}, nil)
redis.call('SET', done, cmsgpack.pack(versions), 'PX', 60000)
return versions
