-- wrk script: POSTs the lines of a file, one after the other and over again, and prints one line of JSON at the end.
-- Usage: wrk ... -s bodies.lua URL -- FILE

local requests = {}
local last = 0

function init(args)
  for line in io.lines(args[1]) do
    requests[#requests + 1] = wrk.format("POST", wrk.path, {["Content-Type"] = "application/json"}, line)
  end
end

function request()
  last = last % #requests + 1
  return requests[last]
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    'RESULT {"requests": %d, "duration_us": %d, "p50_us": %d, "errors": ' ..
    '{"connect": %d, "read": %d, "write": %d, "status": %d, "timeout": %d}}\n',
    summary.requests, summary.duration, latency:percentile(50),
    errors.connect, errors.read, errors.write, errors.status, errors.timeout))
end
