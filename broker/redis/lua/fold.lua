-- Puts a new sum in place of the old one and of the first entries that it was made of, if nobody else did.
-- KEYS: <tag>:row. ARGV: version of the old sum; how many entries; the new sum; "1" if nobody is owed the message any more.
-- Answer: 1, or 0 if somebody else was faster (also if that was this call, and its answer was lost).
-- repeatable
-- include rows
local key = KEYS[1]
local tag = string.sub(key, 1, -4)
local ttl = redis.call('PTTL', key)
if ttl == -2 then return 0 end
local version = redis.call('GETRANGE', tag .. 'sum', 0, 3)
version = version == '' and 0 or struct.unpack('>I4', version)
if ARGV[4] == '1' then cut_row(key) end
if version ~= tonumber(ARGV[1]) or redis.call('LLEN', tag .. 'log') < tonumber(ARGV[2]) then return 0 end
redis.call('SET', tag .. 'sum', ARGV[3], 'PX', math.max(1, ttl))
redis.call('LTRIM', tag .. 'log', ARGV[2], -1)
return 1
