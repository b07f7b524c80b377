-- Compare and set of the control document, with its audit entry.
-- KEYS: the document (a hash), the audit list.
-- ARGV: the expected revision ('' for none), the new one, the document, its audit entry, how many entries are kept.
local revision = redis.call('HGET', KEYS[1], 'revision') or ''
if revision == ARGV[2] then
  return 1 -- the same change, sent again as its reply was lost
end
if revision ~= ARGV[1] then
  return 0
end
redis.call('HSET', KEYS[1], 'revision', ARGV[2], 'document', ARGV[3])
redis.call('LPUSH', KEYS[2], ARGV[4])
redis.call('LTRIM', KEYS[2], 0, tonumber(ARGV[5]) - 1)
return 1
