-- The broadcasts of an app that are spread and not over.
-- KEYS: <tag>:live (sorted set by their ends); beside it :log (see commit.lua). ARGV: now. Answer: their ids.
-- reads only
local tag = string.sub(KEYS[1], 1, -5)
local first = redis.call('LINDEX', tag .. 'log', 0)
first = first and tonumber(string.match(first, '^%d+')) or math.huge
local answer = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. ARGV[1], '+inf')) do
  if tonumber(id) < first then answer[#answer + 1] = id end
end
return answer
