//! OpenAI's list envelope.

use serde::Serialize;
use utoipa::ToSchema;

/// A page of a list.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct List<T> {
    /// Always `list`.
    #[schema(value_type = String, example = "list")]
    object: &'static str,
    /// The items.
    data: Vec<T>,
    /// Whether items follow behind the last one.
    has_more: bool,
    /// Id of the first item.
    first_id: Option<String>,
    /// Id of the last item, the `after` of the next page.
    last_id: Option<String>,
}

impl<T> List<T> {
    /// A page of at most `limit` out of `items`, of which there is one more than that where another page follows.
    pub(super) fn page(mut items: Vec<T>, limit: i64, id: impl Fn(&T) -> String) -> Self {
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let has_more = items.len() > limit;
        items.truncate(limit);
        let (first_id, last_id) = (items.first().map(&id), items.last().map(&id));
        Self { object: "list", data: items, has_more, first_id, last_id }
    }

    /// All items in one page.
    pub(super) fn all(items: Vec<T>, id: impl Fn(&T) -> String) -> Self {
        Self::page(items, i64::MAX, id)
    }
}
