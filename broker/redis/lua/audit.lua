-- Appends to the audit log of the installation, and to the lists of the apps that its entries are about.
-- KEYS[1]: {audit}:log, a stream; KEYS[2]: {audit}:last, the last id; {audit}:of:<app> is a sorted set of ids.
-- ARGV: the least id for entries of now; then app, packed entry, app, …
-- Answer: the first id.
local first = math.max(tonumber(ARGV[1]), tonumber(redis.call('GET', KEYS[2]) or 0) + 1)
local id = first
for i = 2, #ARGV, 2 do
  local text = string.format('%.0f', id)
  redis.call('XADD', KEYS[1], text .. '-0', 'e', ARGV[i + 1])
  redis.call('ZADD', '{audit}:of:' .. ARGV[i], text, text)
  id = id + 1
end
redis.call('SET', KEYS[2], string.format('%.0f', id - 1))
return first
