// A click on a heading sorts by its column, largest first, a second one the other way; what is empty goes last.
document.querySelectorAll("table.sortable thead button").forEach(function (button) {
  button.addEventListener("click", function () {
    var heading = button.parentElement, column = heading.cellIndex, body = heading.closest("table").tBodies[0];
    var words = heading.classList.contains("text");
    var down = heading.getAttribute("aria-sort") !== (words ? "ascending" : "descending") ? !words : words;
    heading.parentElement.querySelectorAll("th").forEach(function (other) { other.removeAttribute("aria-sort"); });
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    function value(row) {
      var text = row.cells[column].textContent;
      return words || text === "" ? text : parseFloat(text);
    }
    Array.from(body.rows).sort(function (a, b) {
      var x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
    }).forEach(function (row) { body.appendChild(row); });
  });
});
