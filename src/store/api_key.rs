//! The table `api_key`.

use sqlx::SqliteConnection;

use super::Result;
use crate::types::api_key::{ApiKey, Scope};
use crate::types::ids::KeyId;

/// Adds a key.
///
/// # Errors
/// The database failed.
pub async fn insert(conn: &mut SqliteConnection, key: &ApiKey) -> Result<()> {
    sqlx::query!(
        "insert into api_key (id, name, owner, scope, hint, key_sha256, created_at_ms, revoked_at_ms)
         values (?, ?, ?, ?, ?, ?, ?, ?)",
        key.id,
        key.name,
        key.owner,
        key.scope,
        key.hint,
        key.key_sha256,
        key.created_at_ms,
        key.revoked_at_ms,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// The key with that hash, unless it was revoked.
///
/// # Errors
/// The database failed.
pub async fn by_sha256(conn: &mut SqliteConnection, key_sha256: &str) -> Result<Option<ApiKey>> {
    let key = sqlx::query_as!(
        ApiKey,
        r#"select id as "id: KeyId", name, owner, scope as "scope: Scope", hint, key_sha256, created_at_ms, revoked_at_ms
             from api_key where key_sha256 = ? and revoked_at_ms is null"#,
        key_sha256,
    )
    .fetch_optional(conn)
    .await?;
    Ok(key)
}

/// Every key that was ever made, oldest first.
///
/// # Errors
/// The database failed.
pub async fn list(conn: &mut SqliteConnection) -> Result<Vec<ApiKey>> {
    let keys = sqlx::query_as!(
        ApiKey,
        r#"select id as "id: KeyId", name, owner, scope as "scope: Scope", hint, key_sha256, created_at_ms, revoked_at_ms
             from api_key order by id"#,
    )
    .fetch_all(conn)
    .await?;
    Ok(keys)
}

/// Whether a key was ever made.
///
/// # Errors
/// The database failed.
pub async fn any(conn: &mut SqliteConnection) -> Result<bool> {
    let any = sqlx::query_scalar!(r#"select exists(select 1 from api_key) as "any!: bool""#).fetch_one(conn).await?;
    Ok(any)
}

/// Refuses a key from now on; one that was revoked before keeps its time. `false`: there is no such key.
///
/// # Errors
/// The database failed.
pub async fn revoke(conn: &mut SqliteConnection, id: KeyId, now_ms: i64) -> Result<bool> {
    let done = sqlx::query!("update api_key set revoked_at_ms = coalesce(revoked_at_ms, ?) where id = ?", now_ms, id)
        .execute(conn)
        .await?;
    Ok(done.rows_affected() == 1)
}
