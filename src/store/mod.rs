//! The database: opening it, and one function a query. The functions take a connection, so that they compose in a transaction.

pub mod api_key;
pub mod artifact;
pub mod attempt;
pub mod checkpoint;
pub mod counts;
pub mod event;
pub mod export;
pub mod file;
pub mod job;
pub mod metric;
pub mod object;
pub mod upload;

use std::path::Path;
use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{Connection, Sqlite, SqlitePool, Transaction};

use crate::types::ids::JobId;
use crate::types::job::Status;

/// What can go wrong with the database.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// SQLite, or the disk below it, failed.
    #[error("database failed: {0}")]
    Database(#[from] sqlx::Error),
    /// The schema cannot be brought up to date.
    #[error("database migration failed: {0}")]
    Migration(#[from] sqlx::migrate::MigrateError),
    /// The schema is another build's.
    #[error(
        "the database has schema {found:?}, this version of lorad has {wanted:?}: use the version that the server runs, or \
         start a server of this version first"
    )]
    OtherSchema {
        /// The last migration that was applied.
        found: Option<i64>,
        /// The last one that there is.
        wanted: Option<i64>,
    },
    /// A JSON column does not hold what this build writes there.
    #[error("database column {column} cannot be read: {source}")]
    Json {
        /// Table and column.
        column: &'static str,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A job's specification is not what this build writes.
    #[error("job {id} cannot be read: {source}")]
    UnreadableJob {
        /// The job.
        id: JobId,
        /// Its state.
        status: Status,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

/// The store's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A handle on the database; clones share its connections.
#[derive(Debug, Clone)]
pub struct Store {
    pool: SqlitePool,
}

impl Store {
    /// Opens the database file, makes it where there is none, and brings its schema up to date.
    ///
    /// # Errors
    /// A file that cannot be opened or is no database, a schema of a newer build.
    pub async fn open(path: &Path) -> Result<Self> {
        let store = Self::connect(path).await?;
        sqlx::migrate!().run(&store.pool).await?;
        Ok(store)
    }

    /// Opens a database that a server may be using, whose schema must be this build's own: it is not for anybody else to change.
    ///
    /// # Errors
    /// A file that cannot be opened or is no database, a schema of another build.
    pub async fn open_as_it_is(path: &Path) -> Result<Self> {
        let store = Self::connect(path).await?;
        // Not for the macro: the table is that of the migrations themselves.
        let found = sqlx::query_scalar("select max(version) from _sqlx_migrations").fetch_one(&store.pool).await?;
        let wanted = sqlx::migrate!().iter().map(|migration| migration.version).max();
        if found != wanted {
            return Err(Error::OtherSchema { found, wanted });
        }
        Ok(store)
    }

    async fn connect(path: &Path) -> Result<Self> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            // FULL: what a client was told is still true after a power cut.
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(Duration::from_secs(10));
        // SQLite itself ends a transaction that a full disk or a failing one breaks; sqlx believes it open for ever, and would
        // refuse every later one on that connection.
        let pool = SqlitePoolOptions::new()
            .max_connections(8)
            // A connection is tried when it is given back; a file does not go away meanwhile, as a network may.
            .test_before_acquire(false)
            .before_acquire(|connection, _| Box::pin(async move { Ok(!connection.is_in_transaction()) }));
        Ok(Self { pool: pool.connect_with(options).await? })
    }

    /// A connection to read with.
    ///
    /// # Errors
    /// No connection came free, or none could be made.
    pub async fn read(&self) -> Result<PoolConnection<Sqlite>> {
        Ok(self.pool.acquire().await?)
    }

    /// Begins a transaction that writes: it waits here for other writers, so that it cannot fail half-way for them.
    ///
    /// # Errors
    /// Another writer did not end in time.
    pub async fn begin_write(&self) -> Result<Transaction<'static, Sqlite>> {
        Ok(self.pool.begin_with("BEGIN IMMEDIATE").await?)
    }

    /// Writes what the database holds at this moment into a new file; it goes on being used meanwhile.
    ///
    /// # Errors
    /// A file that is there already or cannot be written.
    pub async fn snapshot(&self, path: &Path) -> Result<()> {
        let path = path.to_string_lossy();
        // Not for the macro, which would take a snapshot when it looks at the statement.
        sqlx::query("vacuum into ?").bind(path.as_ref()).execute(&self.pool).await?;
        Ok(())
    }

    /// Asks the database for an answer.
    ///
    /// # Errors
    /// There was none.
    pub async fn ping(&self) -> Result<()> {
        sqlx::query!("select 1 as one").fetch_one(&self.pool).await?;
        Ok(())
    }

    /// Closes every connection, after which the write-ahead log is folded into the file.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}

fn from_json<T: serde::de::DeserializeOwned>(column: &'static str, text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|source| Error::Json { column, source })
}

fn to_json<T: serde::Serialize>(column: &'static str, value: &T) -> Result<String> {
    serde_json::to_string(value).map_err(|source| Error::Json { column, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_full_disk_spoils_no_connection() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open(&folder.path().join("lorad.db")).await.expect("a database");
        let mut tx = store.begin_write().await.expect("a transaction");
        // No larger than it is.
        sqlx::query("pragma max_page_count = 1").execute(&mut *tx).await.expect("a setting");
        let insert =
            "insert into file (id, owner, filename, purpose, size_bytes, sha256, object_key, status, created_at_ms)
                      values ('file-1', '', hex(zeroblob(1000000)), '', 0, '', '', '', 0)";
        let full = sqlx::query(insert).execute(&mut *tx).await.expect_err("a full disk").to_string();
        assert!(full.contains("full"), "{full}");
        drop(tx);
        for _ in 0..3 {
            let mut tx = store.begin_write().await.expect("a transaction");
            sqlx::query(insert).execute(&mut *tx).await.expect("room again");
            tx.rollback().await.expect("an end");
        }
    }

    #[tokio::test]
    async fn a_schema_of_another_build_is_nobodys_to_change() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("lorad.db");
        let store = Store::open(&path).await.expect("a database");
        Store::open_as_it_is(&path).await.expect("its own schema").close().await;
        let older = "delete from _sqlx_migrations where version = (select max(version) from _sqlx_migrations)";
        sqlx::query(older).execute(&store.pool).await.expect("an older schema");
        let refused = Store::open_as_it_is(&path).await.expect_err("another schema");
        assert!(matches!(refused, Error::OtherSchema { .. }), "{refused}");
    }
}
