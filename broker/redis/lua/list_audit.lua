-- KEYS[1]: {audit}:log. ARGV: app, or "" for all; ids below this one, or "+"; how many.
-- Answer: of each, newest first: {id-0, {"e", packed}}.
-- repeatable
local all = ARGV[2] == '+'
if ARGV[1] == '' then
  local before = all and '+' or '(' .. ARGV[2] .. '-0'
  return redis.call('XREVRANGE', KEYS[1], before, '-', 'COUNT', ARGV[3])
end
local before = all and '+inf' or '(' .. ARGV[2]
local answer = {}
local of_app = '{audit}:of:' .. ARGV[1]
for _, id in ipairs(redis.call('ZREVRANGEBYSCORE', of_app, before, '-inf', 'LIMIT', 0, ARGV[3])) do
  answer[#answer + 1] = redis.call('XRANGE', KEYS[1], id, id)[1]
end
return answer
