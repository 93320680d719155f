//! An API key: whose requests it speaks for, and what they may do.

use super::ids::KeyId;
use super::text::text_enum;

/// Longest name of a key, and of an owner, in bytes.
const MAX_NAME_BYTES: usize = 64;

text_enum! {
    /// What a key is good for.
    pub enum Scope {
        /// It may look, and download.
        Read = "read",
        /// It may do everything to what is its owner's.
        Write = "write",
    }
}

/// A row of the table `api_key`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiKey {
    /// Its id.
    pub id: KeyId,
    /// What its maker calls it.
    pub name: String,
    /// Whose files, jobs, artifacts and models it reaches.
    pub owner: String,
    /// What it is good for.
    pub scope: Scope,
    /// Its last characters.
    pub hint: String,
    /// Hash of the key, in hexadecimal digits.
    pub key_sha256: String,
    /// When it was made.
    pub created_at_ms: i64,
    /// Since when it is refused.
    pub revoked_at_ms: Option<i64>,
}

/// The name of an owner: it stands in logs, so its letters are few.
///
/// # Errors
/// A name that is empty, too long, or has other characters.
pub fn check_owner(owner: &str) -> Result<String, String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if owner.is_empty() || owner.len() > MAX_NAME_BYTES || !owner.bytes().all(plain) {
        return Err(format!(
            "owner must be 1 to {MAX_NAME_BYTES} letters, digits, dots, hyphens or underscores, got `{}`",
            owner.escape_debug()
        ));
    }
    Ok(owner.to_owned())
}

/// The name of a key.
///
/// # Errors
/// A name that is empty, too long, or cannot be printed.
pub fn check_name(name: &str) -> Result<String, String> {
    if name.is_empty() || name.len() > MAX_NAME_BYTES || name.chars().any(char::is_control) {
        return Err(format!("name must be 1 to {MAX_NAME_BYTES} printable bytes, got `{}`", name.escape_debug()));
    }
    Ok(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_short_and_plain() {
        for good in ["default", "team-a", "a.b_c", &"x".repeat(64)] {
            assert_eq!(check_owner(good).as_deref(), Ok(good));
        }
        for bad in ["", "a b", "a/b", "ä", "a\n", &"x".repeat(65)] {
            let error = check_owner(bad).expect_err(bad);
            assert!(error.starts_with("owner must") && !error.contains('\n'), "{error}");
        }
        assert!(check_name("the CI of team ä").is_ok() && check_name("a\tb").is_err() && check_name("").is_err());
    }
}
