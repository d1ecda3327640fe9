//! `kvlar-ptx-emulation [--accesses | --stalls] IN.ptx OUT.cpp`: see the library.

use kvlar_ptx_emulation::{Style, translate};
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let style = match arguments.first().and_then(|a| a.to_str()) {
        Some("--accesses") => Style::Accesses,
        Some("--stalls") => Style::Stalls,
        _ => Style::Plain,
    };
    arguments.drain(..usize::from(style != Style::Plain));
    let [from, to] = &arguments[..] else {
        eprintln!("usage: kvlar-ptx-emulation [--accesses | --stalls] IN.ptx OUT.cpp");
        return ExitCode::from(2);
    };
    let translated = std::fs::read_to_string(from)
        .map_err(|e| e.to_string())
        .and_then(|text| translate(&text, style))
        .and_then(|cpp| std::fs::write(to, cpp).map_err(|e| e.to_string()));
    match translated {
        Ok(()) => ExitCode::SUCCESS,
        Err(what) => {
            eprintln!("{}: {what}", from.to_string_lossy());
            ExitCode::FAILURE
        }
    }
}
