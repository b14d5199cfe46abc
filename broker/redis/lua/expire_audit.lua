-- KEYS[1]: {audit}:log. ARGV: id, app, id, … of entries to remove. Answer: how many went.
-- repeatable
local gone = 0
for i = 1, #ARGV, 2 do
  gone = gone + redis.call('XDEL', KEYS[1], ARGV[i])
  redis.call('ZREM', '{audit}:of:' .. ARGV[i + 1], ARGV[i])
end
return gone
