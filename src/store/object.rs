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
