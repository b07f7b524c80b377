-- Takes events: each once, a user's clicks into their past. The result is the same for any order, repetition and
-- grouping of calls. Behind past.lua.
-- KEYS  pasts and tag lists, in any order
-- ARGV  most clicks of a past, most bytes of one, seconds to keep it, seconds to keep a tag list; then four for each
--       event: the position of its tag list in KEYS, its tag, the position of its past or 0, its record or nothing.
--       One user's events stand together and in the order of a past.
-- Returns for each event 1 if it was new, 0 if it was known, 2 if its keys hold what this script cannot read: they are
-- left as they are.

local TAG = 6
local MAX_TAGS_BYTES = 65536 -- of a day and user; beyond it the older half is forgotten
local find = string.find
local tags_ttl = ARGV[4]

-- Tag lists and pasts as they are read once, with what is added; false for one that cannot be read.
local tag_lists, pasts, touched = {}, {}, {}

local function tag_list(position)
  local list = tag_lists[position]
  if list == nil then
    local value = redis.pcall('GET', KEYS[position])
    if type(value) == 'table' then
      list = false
    else
      list = {known = value or '', added = {}}
    end
    tag_lists[position] = list
  end
  return list
end

local function is_known(list, tag)
  if list.added[tag] then return true end
  local from = 1
  while true do
    local at = find(list.known, tag, from, true)
    if not at then return false end
    if (at - 1) % TAG == 0 then return true end
    from = at + 1
  end
end

local function past_of(position)
  local past = pasts[position]
  if past == nil then
    past = past_at(KEYS[position])
    pasts[position] = past
    if past then
      past.events = {}
      touched[#touched + 1] = position
    end
  end
  return past
end

local results, added = {}, {}
local function refuse(past) -- what cannot be merged
  past.is_changed = false
  for _, event in ipairs(past.events) do results[event] = 2 end
end

for i = 5, #ARGV, 4 do
  local event = #results + 1
  local list, position = tag_list(tonumber(ARGV[i])), tonumber(ARGV[i + 2])
  local past = position > 0 and past_of(position)
  results[event] = 2
  if list and (position == 0 or past) then
    local tag = ARGV[i + 1]
    results[event] = 0
    if not is_known(list, tag) then
      list.added[tag] = true
      added[event] = {list, tag}
      results[event] = 1
      if past then
        past.events[#past.events + 1] = event
        local is_merged, is_new = pcall(insert, past, ARGV[i + 3])
        if not is_merged then
          refuse(past)
        elseif not is_new then
          results[event] = 0
        end
      end
    end
  end
end

for _, position in ipairs(touched) do
  local past = pasts[position]
  if past.is_changed then
    local is_merged, value = pcall(merged, past)
    if is_merged then redis.call('SET', KEYS[position], value, 'EX', past_ttl) else refuse(past) end
  end
end

local tags = {}
for event, result in ipairs(results) do
  if result ~= 2 and added[event] then
    local list, tag = added[event][1], added[event][2]
    tags[list] = (tags[list] or '') .. tag
  end
end
for position, list in pairs(tag_lists) do
  local more = list and tags[list]
  if more then
    local known = list.known
    if #known + #more > MAX_TAGS_BYTES then known = sub(known, math.floor(#known / TAG / 2) * TAG + 1) end
    -- Not APPEND: a server doubles what it appends to.
    redis.call('SET', KEYS[position], known .. more, 'EX', tags_ttl)
  end
end
return results
