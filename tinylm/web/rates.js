// Rates per second from two answers of `/live`. Pure functions.

/** Subtract the counters of replicas that are in both answers. A new replica counts from its second answer. */
export function between(before, after) {
  const old = new Map(before.replicas.map((replica) => [replica.id, replica]));
  const seconds = (after.at - before.at) / 1000;
  const pairs = after.replicas.filter(({ id }) => old.has(id)).map((replica) => [old.get(replica.id), replica]);
  const sum = (name) => pairs.reduce((total, [a, b]) => total + Math.max(b[name] - a[name], 0), 0);
  const counts = after.latency_bounds_s.map(() => 0).concat(0);
  for (const [a, b] of pairs) b.latency_counts.forEach((count, i) => (counts[i] += count - a.latency_counts[i]));
  return {
    requests_per_s: sum("requests") / seconds,
    tokens_per_s: sum("tokens") / seconds,
    tokens_per_s_of: new Map(pairs.map(([a, b]) => [b.id, (b.tokens - a.tokens) / seconds])),
    latency_counts: counts,
  };
}

/** A quantile of a histogram, in seconds, linear within its bucket; null when it is empty. */
export function quantile(bounds_s, counts, share) {
  const total = counts.reduce((a, b) => a + b, 0);
  if (!total) return null;
  let rest = share * total;
  for (const [i, count] of counts.entries()) {
    if (count && rest <= count) {
      const low = bounds_s[i - 1] ?? 0;
      return low + ((bounds_s[i] ?? low) - low) * (rest / count);
    }
    rest -= count;
  }
  return bounds_s.at(-1);
}
