//! Which objects of the storage the tables name.

use sqlx::SqliteConnection;

use super::Result;

/// The keys of all objects that a row names.
///
/// # Errors
/// The database failed.
pub async fn named(conn: &mut SqliteConnection) -> Result<Vec<String>> {
    let keys = sqlx::query_scalar!(
        r#"select object_key as "object_key!" from file
           union all select object_key from checkpoint
           union all select object_key from artifact
           union all select object_key from upload_part"#
    )
    .fetch_all(conn)
    .await?;
    Ok(keys)
}

/// An object, and what is known of its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// Its key.
    pub key: String,
    /// How many bytes it has.
    pub size_bytes: i64,
    /// Hash of its bytes; parts of uploads have none.
    pub sha256: Option<String>,
}

/// Every object that a row names, with its size and hash; those that are replaced soonest come first.
///
/// # Errors
/// The database failed.
pub async fn all(conn: &mut SqliteConnection) -> Result<Vec<Named>> {
    let objects = sqlx::query_as!(
        Named,
        r#"select object_key as "key!", size_bytes as "size_bytes!", sha256 as "sha256?: String" from checkpoint
           union all select object_key, size_bytes, sha256 from file
           union all select object_key, size_bytes, sha256 from artifact
           union all select object_key, size_bytes, null from upload_part"#
    )
    .fetch_all(conn)
    .await?;
    Ok(objects)
}

/// Removes the row that names an object.
///
/// # Errors
/// The database failed.
pub async fn forget(conn: &mut SqliteConnection, key: &str) -> Result<()> {
    sqlx::query!("delete from file where object_key = ?", key).execute(&mut *conn).await?;
    sqlx::query!("delete from checkpoint where object_key = ?", key).execute(&mut *conn).await?;
    sqlx::query!("delete from artifact where object_key = ?", key).execute(&mut *conn).await?;
    sqlx::query!("delete from upload_part where object_key = ?", key).execute(conn).await?;
    Ok(())
}
