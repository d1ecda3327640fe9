//! Results files.

use serde_json::Value;
use std::fs;
use std::path::Path;

/// Reads JSON.
///
/// # Errors
/// If there is none in the file; names it.
pub fn read_json(path: &Path) -> Result<Value, String> {
    let text = fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    serde_json::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))
}

/// Writes JSON. Whoever reads the file meanwhile, or finds it after a crash, has the old text or the new one.
///
/// # Errors
/// If the file or its folder cannot be written; names it.
pub fn write_json(path: &Path, json: &Value) -> Result<(), String> {
    write_text(path, &pretty(json))
}

/// Writes text, as [`write_json`] does.
///
/// # Errors
/// As there.
pub fn write_text(path: &Path, text: &str) -> Result<(), String> {
    let mut part = path.file_name().unwrap_or_default().to_os_string();
    part.push(".part");
    let part = path.with_file_name(part);
    let folder = path.parent().unwrap_or(Path::new(""));
    let written = fs::create_dir_all(folder).and_then(|()| fs::write(&part, text)).and_then(|()| fs::rename(&part, path));
    written.map_err(|e| format!("{}: {e}", path.display()))
}

/// As all results files are written.
pub fn pretty(json: &Value) -> String {
    serde_json::to_string_pretty(json).expect("JSON") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_written_replaces_what_was_there() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("new/some.json");
        for x in [1, 2] {
            write_json(&path, &json!({ "x": x })).expect("written");
            assert_eq!(read_json(&path).expect("read"), json!({ "x": x }));
        }
        let left: Vec<_> = fs::read_dir(path.parent().expect("a folder")).expect("files").collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }

    #[test]
    fn errors_name_the_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("broken.json");
        assert!(read_json(&path).expect_err("no file").contains("broken.json"));
        fs::write(&path, "{ \"op\": ").expect("written");
        assert!(read_json(&path).expect_err("no JSON").contains("broken.json"));
        assert!(write_json(&path.join("below"), &Value::Null).expect_err("no folder").contains("broken.json"));
    }
}
