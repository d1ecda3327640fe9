//! The date of a run.

use std::time::{SystemTime, UNIX_EPOCH};

/// `KVLAR_BENCH_DATE`, else today in UTC, as `2026-01-31`.
pub fn today() -> String {
    std::env::var("KVLAR_BENCH_DATE").unwrap_or_else(|_| {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        civil(seconds / 86400)
    })
}

/// Day `days` after 1970-01-01, counted in years that begin in March, so that leap days come last.
fn civil(days: u64) -> String {
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    format!("{:04}-{month:02}-{day:02}", era * 400 + year + next)
}

#[cfg(test)]
mod tests {
    #[test]
    fn days_are_dates() {
        for (days, date) in
            [(0, "1970-01-01"), (59, "1970-03-01"), (11_016, "2000-02-29"), (19_723, "2024-01-01"), (20_453, "2025-12-31")]
        {
            assert_eq!(super::civil(days), date);
        }
    }
}
