-- Doorbells for one node: count them, and publish them under their number.
-- KEYS: the node's counter, its channel. ARGV: how far to count (2: what came before was lost, and the gap tells), the
-- doorbells, seconds to live of the counter (its node prolongs it).
-- Answer: the number.
-- volatile
local number = redis.call("INCRBY", KEYS[1], ARGV[1])
if number <= 2 then
  redis.call("EXPIRE", KEYS[1], ARGV[3])
end
redis.call("SPUBLISH", KEYS[2], string.format("%.0f ", number) .. ARGV[2])
return number
